"""Reads a Hugging Face checkpoint: weights, tokenizer files and chat template."""
