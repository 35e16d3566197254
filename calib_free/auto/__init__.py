"""Method `auto`: bit widths from the sensitivity of the model to each weight."""
