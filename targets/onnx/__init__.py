"""ONNX Runtime on CPU: one model with fused and n-bit contrib operators."""
