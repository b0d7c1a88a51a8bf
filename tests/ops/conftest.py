"""Backends for the tests of the ops over trajectories."""

import pytest

from tests.kernels import interpreter
from tests.ops.ragged import skip_unless_here

interpreter.install()


@pytest.fixture(params=["reference", "numba", "cpp", "triton", "cuda"])
def backend(request):
    """Every backend, where it is available."""
    skip_unless_here(request.param)
    return request.param


@pytest.fixture(params=["reference", "numba", "triton", "cuda", "portable", "avx2", "avx512"])
def kernel(request):
    """Every backend, cpp in each instruction set of this machine."""
    if request.param in ("reference", "numba", "triton", "cuda"):
        skip_unless_here(request.param)
        yield request.param
        return
    native = pytest.importorskip("parl_core._native")
    if request.param not in native.isas():
        pytest.skip(f"this machine has no {request.param}")
    best = native.isa()
    native.use_isa(request.param)
    yield "cpp"
    native.use_isa(best)
