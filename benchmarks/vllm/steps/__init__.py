"""Decode steps looked into: around kernels, and in place."""
