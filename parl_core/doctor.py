"""What is installed here, and which backend each op can use: the text of `parl doctor`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import platform
import re
import shutil
import subprocess
import textwrap
from collections.abc import Sequence

import torch

from . import __version__
from .ops import support_table
from .ops.accelerators import cuda_library, why_no_cuda, why_no_triton
from .ops.choice import DEFAULT_ORDER, NOT_MEASURED, rules

_EXTRAS = {
    "numba": ("numba",),
    "dm-control": ("dm_control", "mujoco"),
    "metaworld": ("metaworld", "gymnasium"),
    "train": ("tyro", "rich", "tensorboard", "matplotlib", "safetensors"),
}
_WITH_OPS = ("hypergrad.linearize", "optim", "preference.pair_gradient", "rl.sac")
"""Modules that hold ops of their own, beside those of `ops`."""
_ON_CPU, _ON_GPU = ("reference", "numba", "cpp"), ("reference", *DEFAULT_ORDER[::-1])
_WIDTH = 110
_UNRULED = f"the first usable of {', '.join((*DEFAULT_ORDER, 'reference'))}; {NOT_MEASURED}"


def report() -> str:
    """Versions, extras with the line that installs what is missing, and for each op what computes it, and why not others."""
    for module in _WITH_OPS:
        with contextlib.suppress(ImportError):  # of an extra, which the report names
            importlib.import_module(f"parl_core.{module}")
    return "\n".join([*_versions(), "", "Extras", *_extras(), "", *_cpu_ops(), "", *_gpu_ops()])


def _versions() -> list[str]:
    return [
        f"parl-core {__version__}, Python {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        + (f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"),
        f"GPU {gpu() or 'none visible'}, nvcc {_nvcc() or 'not found'}, Triton {_version('triton') or 'not installed'}, "
        f"CUDA kernels {'in the extension' if _has_cuda_kernels() else 'not in the extension'}",
    ]


def _extras() -> list[str]:
    lines = []
    for extra, packages in _EXTRAS.items():
        versions = {name: _version(name) for name in packages}
        missing = [name for name, version in versions.items() if version is None]
        found = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
        hint = f"{', '.join(missing)} missing: pip install 'parl-core[{extra}]'" if missing else ""
        lines.append(f"  {extra:<12}{'; '.join(part for part in (found, hint) if part)}")
    return lines


def _cpu_ops() -> list[str]:
    title = "Ops on CPU tensors in float32: + usable, – not here; of these the first of cpp, numba, reference is taken"
    return [title, *_table("cpu", _ON_CPU)]


def _gpu_ops() -> list[str]:
    """The same for CUDA tensors, with what is taken at which size; without a GPU the reason, and what tests can do."""
    reasons = {name: why() for name, why in (("triton", why_no_triton), ("cuda", why_no_cuda))}
    if not torch.cuda.is_available():
        told = [f"{name}: {reason or 'runs on CPU tensors, for tests'}" for name, reason in reasons.items()]
        hints = [
            "tests run the Triton kernels in Triton's interpreter (TRITON_INTERPRET=1), and the CUDA kernels compiled for "
            "the host (PARL_CUDA_EMULATED names that build), on CPU tensors and slowly",
            "on a machine with a GPU benchmarks/gpu.sh tests and times them all",
        ]
        return ["Ops on CUDA tensors: none here", *_wrapped(told), *_wrapped(hints)]
    title = "Ops on CUDA tensors in float32: + usable, – not here; what is taken at which size follows"
    return [title, *_table("cuda", _ON_GPU), "", *_choices()]


def _table(device_type: str, backends: Sequence[str]) -> list[str]:
    """A row for each op, and each reason once. What an op does not have needs no reason: its cell is empty."""
    table = support_table(device_type)
    width = max(len(op) for op in table) + 2
    lines = ["  " + " " * width + "".join(f"{name:<12}" for name in backends).rstrip()]
    reasons: dict[str, None] = {}
    for op, support in table.items():
        cells = ""
        for name in backends:
            reason = support[name]
            lacking = reason == f"it does not implement {op}"
            cells += f"{'+' if reason is None else '' if lacking else '–':<12}"
            if reason is not None and not lacking:
                reasons[f"{name}: {reason}"] = None
        lines.append(("  " + op.ljust(width) + cells).rstrip())
    return lines + _wrapped(list(reasons))


def _choices() -> list[str]:
    """What is taken at which size, and why."""
    lines = ["Taken on CUDA tensors, by their number of elements"]
    grounds: dict[str, int] = {}
    for op in support_table("cuda"):
        parts, above = [], 0
        for rule in rules().get(op, ()):
            span = f"≤ {rule.up_to}" if rule.up_to is not None else f"> {above}" if above else "any"
            number = grounds.setdefault(rule.grounds, len(grounds) + 1)
            parts.append(f"{span}: {rule.backend} [{number}]")
            above = rule.up_to or above
        lines.append(f"  {op}: {', '.join(parts) or _UNRULED}")
    return lines + _wrapped([f"[{number}] {ground}" for ground, number in grounds.items()])


def _wrapped(lines: Sequence[str]) -> list[str]:
    wrapper = textwrap.TextWrapper(_WIDTH, initial_indent="  ", subsequent_indent="    ")
    return [piece for line in lines for piece in wrapper.wrap(line)]


def gpu() -> str | None:
    """Name, compute capability and driver of the first NVIDIA GPU; None without one that torch can use."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return f"{torch.cuda.get_device_name(0)} (sm_{major}{minor}), driver {_driver() or 'unknown'}"


def _driver() -> str | None:
    told = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return told.splitlines()[0].strip() if told else None


def _nvcc() -> str | None:
    told = _output(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc", "--version")
    found = re.search(r"release ([\d.]+)", told or "")
    return found[1] if found else None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _has_cuda_kernels() -> bool:
    try:
        cuda_library()
    except ImportError:
        return False
    return True


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
