"""Tensors as JAX's arrays, without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from benchmarks.harness import Absent


def to_jax(tensors: Sequence[Tensor]) -> list[Any]:
    """On the device where they are.

    Raises:
        ImportError: JAX is not installed.
        Absent: it does not know that device.
    """
    import jax
    import jax.numpy as jnp

    if tensors and tensors[0].is_cuda and jax.default_backend() != "gpu":
        raise Absent(f"this JAX runs on {jax.default_backend()} only")
    return [jnp.from_dlpack(tensor.detach()) for tensor in tensors]
