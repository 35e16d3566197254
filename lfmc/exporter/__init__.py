"""From a checkpoint to a verified bundle, and verifying or comparing finished bundles."""
