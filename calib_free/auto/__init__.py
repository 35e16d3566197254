"""Method `auto`: choose formats by the sensitivity of the model's output to each weight."""
