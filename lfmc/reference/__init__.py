"""Models in torch that run layer by layer: the references that an artifact is compared with."""
