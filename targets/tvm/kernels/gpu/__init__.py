"""Kernels for GPUs: the names and signatures of the CPU kernels, with float activations."""
