"""Comparing two models token by token: logits, experts, text quality."""
