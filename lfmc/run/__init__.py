"""Runs a model: steppers, text generation and timing."""
