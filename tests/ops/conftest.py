"""Backends for the tests of the ops over trajectories."""

import pytest

from parl_core.ops import available_backends
from tests.kernels import interpreter

interpreter.install()


@pytest.fixture(params=["reference", "numba", "cpp", "triton"])
def backend(request):
    """Every backend, where it is available."""
    if request.param not in available_backends():
        pytest.skip(f"backend {request.param} is unavailable")
    return request.param


@pytest.fixture(params=["reference", "numba", "triton", "portable", "avx2", "avx512"])
def kernel(request):
    """Every backend, cpp in each instruction set of this machine."""
    if request.param in ("reference", "numba", "triton"):
        if request.param not in available_backends():
            pytest.skip(f"backend {request.param} is unavailable")
        yield request.param
        return
    native = pytest.importorskip("parl_core._native")
    if request.param not in native.isas():
        pytest.skip(f"this machine has no {request.param}")
    best = native.isa()
    native.use_isa(request.param)
    yield "cpp"
    native.use_isa(best)
