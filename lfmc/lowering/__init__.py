"""The checked options of an export, and the fused program that a target lowers."""
