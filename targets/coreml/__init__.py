"""Core ML: a stateful ML program with two functions, and an interpreter for any machine."""
