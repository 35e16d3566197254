"""Qualcomm's Hexagon NPUs, by QNN."""
