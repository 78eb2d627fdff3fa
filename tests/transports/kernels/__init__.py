"""Jupyter's front ends, against real kernels and real clients."""
