"""Operators that know tensors and nothing else."""
