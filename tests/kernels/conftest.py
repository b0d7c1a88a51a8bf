"""Triton's interpreter for the tests of kernels."""

from tests.kernels import interpreter

interpreter.install()
