"""The kernels for GPUs: the same names and signatures as those for CPUs, activations as floats."""
