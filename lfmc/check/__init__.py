"""`lfmc check`: export and verify a matrix of models and targets, and compare with a baseline."""
