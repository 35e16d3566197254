"""Bit plans made from a checkpoint alone, without calibration data."""
