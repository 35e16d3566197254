"""The TVM target."""
