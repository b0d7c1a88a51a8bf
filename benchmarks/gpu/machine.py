"""What the machine is, and what it can do at best: the floors beside which all times are seen."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.harness.environment import describe_machine
from benchmarks.harness.floors import copy_floor

from .case import Lab

_QUERY = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw")
_PATIENCE = 10.0
"""Seconds that the driver has to answer."""
_ROUNDS = 7


def describe() -> dict[str, Any]:
    """Commit, versions, and the GPU; JSON scalars."""
    versions = {"cuda": torch.version.cuda, "triton": _triton()}
    facts = {**describe_machine(), **versions}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }
    return facts


def _told_by_driver() -> dict[str, str]:
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE).stdout.strip().splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = told[0].split(", ") if told else []
    return {name.replace(".", "_"): value for name, value in zip(_QUERY[1:], values[1:], strict=False)}


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def measure(lab: Lab) -> dict[str, Any]:
    """Copy bandwidth, rates of matrix products and the cost of a launch, each the median of a few turns, in SI units.

    Driver and clocks are read right after that: a GPU that has nothing to do clocks down.

    TF32 and bfloat16 are for information: nothing that is timed here uses TF32.
    """
    tiny = lab.device.type == "cpu"
    with lab.clock.running():
        copy = copy_floor(1.0, device=lab.device)
        size = 64 if tiny else 8192
        small = torch.zeros(1, device=lab.device)
        found: dict[str, Any] = {
            "copy_bytes_per_s": 1.0 / (copy.scale * _on_device(lab, copy.run)),
            "launch_s": _median(lambda: lab.clock.a_call(lambda: small.add_(1.0))),
            "launch_on_device_s": _on_device(lab, lambda: small.add_(1.0)),
            "gemm_fp32_flops": 2.0 * size**3 / _product(lab, size, torch.float32),
            "gemm_bf16_flops": 2.0 * size**3 / _product(lab, size, torch.bfloat16),
        }
        if not tiny:
            torch.backends.cuda.matmul.allow_tf32 = True
            found["gemm_tf32_flops"] = 2.0 * size**3 / _product(lab, size, torch.float32)
            torch.backends.cuda.matmul.allow_tf32 = False
    return {**found, **_told_by_driver()}


def _product(lab: Lab, size: int, dtype: torch.dtype) -> float:
    """Seconds of a square product of random numbers; products of zeros draw less power and run faster."""
    generator = torch.Generator(lab.device).manual_seed(0)
    first, second = (torch.randn(size, size, generator=generator, device=lab.device).to(dtype) for _ in range(2))
    out = torch.empty_like(first)
    return _on_device(lab, lambda: torch.mm(first, second, out=out))


def _on_device(lab: Lab, run: Callable[[], Any]) -> float:
    recorded = lab.clock.recorded(run, cold=False)
    return _median(lambda: lab.clock.on_device(recorded))


def _median(timed: Callable[[], float]) -> float:
    return median(timed() for _ in range(_ROUNDS))
