"""The four parity rungs of an export, and finding the operator that fails."""
