"""Exports a checkpoint to a verified bundle; verifies and compares finished bundles."""
