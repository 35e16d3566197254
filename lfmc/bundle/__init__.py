"""The folder that an export writes: files, manifest and token ids."""
