"""Runs the four parity rungs of an export, and finds the operator that is wrong."""
