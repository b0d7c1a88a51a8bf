"""Kernels written in Python, imported as `parl_core.kernels`; the ops load them at first use."""
