"""When the extension is built for the GPU command, and what is told of a build that fails; CMake is a script here."""

from __future__ import annotations

import os
import sys
import time

import pytest

from benchmarks.gpu import build

CMAKE = """#!{python}
import pathlib, sys
if sys.argv[1] == "--build" and {builds}:
    pathlib.Path(sys.argv[2], {name!r}).write_text("built")
print(sys.argv[1:])
sys.exit({status})
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with a source and an extension that was built from it, and a `cmake` that ends with `status`."""
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "FOLDER", tmp_path / "build" / "gpu")
    monkeypatch.setattr(build, "_nvcc", lambda: "/somewhere/nvcc")
    monkeypatch.setenv("CUDACXX", "")
    monkeypatch.setattr(build.subprocess, "run", lambda *args, **options: type("Done", (), {"stdout": "/pybind11"}))
    for folder in ("csrc", "parl_core", "bin"):
        (tmp_path / folder).mkdir()
    (tmp_path / "csrc" / "scan.cu").write_text("")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def cmake(status=0, builds=True):
        script = tmp_path / "bin" / "cmake"
        script.write_text(
            CMAKE.format(python=sys.executable, name=build.extension().name, status=status, builds=builds)
        )
        script.chmod(0o755)

    cmake()
    return tmp_path, cmake


def run(path):
    return build.build(path / "log", time.monotonic() + 60)


def test_it_is_built_once_and_again_for_newer_sources(checkout):
    path, _ = checkout
    assert build.why_build() == "it is not built"
    assert run(path) is None and build.why_build() is None
    assert build.extension().read_text() == "built"
    assert "-DPARL_CUDA=ON" in (path / "log").read_text() and "-Dpybind11_DIR=/pybind11" in (path / "log").read_text()
    later = time.time() + 10
    os.utime(path / "csrc" / "scan.cu", (later, later))
    assert build.why_build() == "sources are newer"


def test_what_something_else_built_is_built_anew(checkout):
    build.extension().write_text("without CUDA")
    assert build.why_build() == "it was built by something else"


def test_a_build_that_fails_leaves_the_old_extension(checkout):
    path, cmake = checkout
    cmake(status=3)
    build.extension().write_text("old")
    assert "ended with status 3" in run(path)
    assert build.extension().read_text() == "old"


def test_a_build_without_an_extension_is_told(checkout):
    path, cmake = checkout
    cmake(builds=False)
    build.extension().write_text("old")
    assert run(path) == f"CMake built no extension; see {path / 'log'}"
    assert build.extension().read_text() == "old"


def test_without_nvcc_the_rest_is_built(checkout, monkeypatch):
    path, _ = checkout
    monkeypatch.setattr(build, "_nvcc", lambda: None)
    assert "nvcc is not found" in run(path)
    assert build.extension().read_text() == "built" and "-DPARL_CUDA=OFF" in (path / "log").read_text()
