"""The extension with its CUDA kernels, built in place by CMake; only if a source is newer than it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from parl_core.provenance import available_cores

from . import processes
from .store import ROOT, source_files

FOLDER = ROOT / "build" / "gpu"
_SOURCES = ("CMakeLists.txt", "csrc", "bindings")


def extension() -> Path:
    """Where Python looks for it."""
    return ROOT / "parl_core" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"


def why_build() -> str | None:
    """Why it has to be built, or None."""
    path = extension()
    if not path.exists():
        return "it is not built"
    if not (FOLDER / path.name).exists():
        return "it was built by something else"  # perhaps without CUDA
    newest = max(source.stat().st_mtime for source in source_files(ROOT, *_SOURCES))
    return "sources are newer" if newest > path.stat().st_mtime else None


def link_kernels() -> None:
    """`parl_core.kernels` is the folder kernels/; where the package is not installed, a link makes it so."""
    link = ROOT / "parl_core" / "kernels"
    if importlib.util.find_spec("parl_core.kernels") is None and not link.exists():
        link.symlink_to(Path("..", "kernels"))


def build(log: Path, until: float) -> str | None:
    """Configure, compile, and put the extension where Python finds it; returns what went wrong, None if nothing did.

    Without nvcc everything but the CUDA kernels is built.
    """
    nvcc = _nvcc()
    if nvcc is not None:
        os.environ["CUDACXX"] = nvcc
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        pybind11 = subprocess.run(
            [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except subprocess.CalledProcessError:
        return "pybind11 is not installed"
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    options = [
        f"-Dpybind11_DIR={pybind11}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DPARL_CUDA={'OFF' if nvcc is None else 'ON'}",
    ]
    commands = (
        ["cmake", *ninja, "-S", str(ROOT), "-B", str(FOLDER), "-DCMAKE_BUILD_TYPE=Release", *options],
        ["cmake", "--build", str(FOLDER), "--parallel", str(available_cores())],
    )
    for command in commands:
        try:
            status = processes.finish(processes.start(command, log), until)
        except FileNotFoundError:
            return f"{command[0]} is not installed"
        if status != 0:
            told = "was stopped, for want of time," if status is None else f"ended with status {status}"
            return f"{' '.join(command[:2])} {told}; see {log}"
    if not (FOLDER / extension().name).exists():
        return f"CMake built no extension; see {log}"  # as without a compiler, or without Python's headers
    shutil.copy(FOLDER / extension().name, extension())
    os.utime(extension(), (time.time(), time.time()))
    return "nvcc is not found, so the extension has no CUDA kernels: install the CUDA toolkit" if nvcc is None else None


def _nvcc() -> str | None:
    usual = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.exists() else None)
