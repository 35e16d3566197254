"""This machine: memory, cache, worker processes, progress output, installed versions."""
