"""The folder that an export writes: its files, manifest and token ids."""
