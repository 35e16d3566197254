"""lfmc: quantize and export Liquid Foundation Models, with every artifact proven."""

__version__ = "0.1.0"
