"""The machine that lfmc runs on: memory, cache, workers, progress output, package versions."""
