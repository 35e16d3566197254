"""TIR kernels of the fused operators, one file each."""
