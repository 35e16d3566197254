"""ONNX Runtime: one model for the CPU with fused and n-bit contrib operators."""
