"""The bit plan: one row per stored tensor, its checks, and the tensors it describes."""
