"""Finds the first operator, pass, module or stored tensor that differs, when parity fails."""
