"""The loops of the tabular MDPs, compiled by numba."""
