"""Choosing one format per tensor under a byte budget."""
