"""Text for rung 4 of parity: passages in the public domain, the same for every model."""
