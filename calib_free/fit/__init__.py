"""Fine-tuning what a plan stores (codes, scales, norms) on text that the model writes."""
