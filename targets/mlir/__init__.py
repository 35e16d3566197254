"""MLIR by torch-mlir, compiled and run by IREE."""
