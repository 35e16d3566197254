"""Passages in the public domain, the text of rung 4 of parity for every model."""
