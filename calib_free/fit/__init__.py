"""Fine-tuning of a plan's codes, scales and norms on text sampled from the model."""
