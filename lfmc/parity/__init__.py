"""Compares two models token by token: logits, experts and text quality."""
