"""What is installed here, and which backend each op can use: the text of `parl doctor`."""

from __future__ import annotations

import importlib.metadata
import platform
import textwrap

import torch

from . import __version__
from .ops import support_table

_EXTRAS = {
    "numba": ("numba",),
    "dm-control": ("dm_control", "mujoco"),
    "metaworld": ("metaworld", "gymnasium"),
    "train": ("tyro", "rich", "tensorboard", "matplotlib", "safetensors"),
}


def report() -> str:
    """Versions, extras with the line that installs what is missing, and the table of op × backend with why-nots."""
    lines = [
        f"parl-core {__version__}, Python {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        + (f"CUDA {torch.version.cuda}" if torch.cuda.is_available() else "no CUDA device"),
        "",
        "Extras",
    ]
    for extra, packages in _EXTRAS.items():
        versions = {name: _version(name) for name in packages}
        missing = [name for name, version in versions.items() if version is None]
        found = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
        hint = f"{', '.join(missing)} missing: pip install 'parl-core[{extra}]'" if missing else ""
        lines.append(f"  {extra:<12}{'; '.join(part for part in (found, hint) if part)}")
    lines += [
        "",
        "Ops on CPU tensors in float32: + usable, – not; the leftmost usable one of cpp, numba, reference is taken",
    ]
    table = support_table()
    backends = list(next(iter(table.values())))
    width = max(len(op) for op in table) + 2
    lines.append("  " + " " * width + "".join(f"{name:<12}" for name in backends))
    reasons: dict[str, str] = {}
    for op, support in table.items():
        cells = "".join(f"{'+' if support[name] is None else '–':<12}" for name in backends)
        lines.append("  " + op.ljust(width) + cells)
        for name, reason in support.items():
            if reason is not None:
                reasons.setdefault(f"{name}: {reason}", op)
    for reason in reasons:
        lines += textwrap.wrap(reason, 110, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
