"""Chooses one format for each tensor under a byte budget."""
