"""The version of lfmc, in a separate module that imports nothing else."""

__version__ = "0.1.0"
