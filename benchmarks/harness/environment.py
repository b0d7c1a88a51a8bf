"""What a number depends on besides the code."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch

from parl_core.provenance import available_cores, describe_environment, version

PEERS = ("jax", "jaxlib", "curvlinops-for-pytorch", "torchopt", "torchrl", "stable-baselines3", "sbx-rl")
"""Packages that are raced against, beside those that the environment tells anyway."""


def describe_machine() -> dict[str, Any]:
    """Commit, versions of everything that is raced, processor, cores, threads and instruction set; JSON scalars."""
    return {
        **describe_environment(),
        **{name: version(name) for name in PEERS},
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "isa": _isa(),
    }


def _isa() -> str | None:
    """The instruction set that the kernels choose, None if they are not built."""
    try:
        return importlib.import_module("parl_core._native").isa()
    except ImportError:
        return None
