"""Ragged data for the tests of the ops over trajectories, and what is common to them."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from parl_core.ops import available_backends
from parl_core.ops.accelerators import emulated, interpreted

LENGTHS = {
    "one": [5],
    "ragged": [3, 1, 7, 2],
    "empty_among": [0, 4, 0, 0, 3, 0],
    "single_steps": [1, 1, 1, 1],
    "odd": [63, 1000, 1, 63],
    "around_a_vector": [15, 16, 17, 7, 8, 9, 3, 4, 5, 1, 2, 1, 31, 32, 33],
    "no_steps": [0, 0],
    "no_trajectories": [],
}


def cpu_backends() -> list[str]:
    """The backends made for the CPU, where they are available: what is interpreted there is too slow for many examples."""
    return [name for name in ("reference", "numba", "cpp") if name in available_backends()]


def skip_unless_here(backend: str) -> None:
    """Skip the test where `backend` cannot compute on the CPU: not available, or on a GPU, where tests of its own test it."""
    if backend not in available_backends():
        pytest.skip(f"backend {backend} is unavailable")
    if backend == "triton" and not interpreted():
        pytest.skip("Triton's kernels run on the GPU here")
    if backend == "cuda" and not emulated():
        pytest.skip("the CUDA kernels run on the GPU here")


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def random_values(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def pieces(lengths: list[int], *steps: Tensor) -> Iterator[tuple[list[float], ...]]:
    """The trajectories of `steps`, each as lists of Python floats."""
    start = 0
    for length in lengths:
        yield tuple(tensor[start : start + length].tolist() for tensor in steps)
        start += length


def doubles(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)
