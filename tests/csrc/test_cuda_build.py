"""What the extension carries for GPUs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def extension():
    """The built extension, where nvcc was there to build CUDA kernels."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    native = pytest.importorskip("parl_core._native")
    assert hasattr(native, "cuda"), "nvcc is installed, but the extension was built without it"
    return native


def test_it_is_imported_without_a_gpu(extension):
    """And every kind of kernel is bound; what they compute is tested by the emulation, and on GPUs."""
    for name in ("discounted_scan", "linear_recurrence", "lambda_returns", "vtrace", "scan_workspace"):
        assert callable(getattr(extension.cuda, name))


def test_it_is_for_every_gpu_from_sm_80_on(extension):
    """Machine code for sm_80 and sm_90, PTX for those that come later: of every source."""
    tool = cuobjdump()
    if tool is None:
        pytest.skip("cuobjdump is not installed")
    listing = subprocess.run([tool, "--list-elf", "--list-ptx", extension.__file__], capture_output=True, text=True)
    assert listing.returncode == 0, listing.stderr
    sources = len(list((ROOT / "csrc/cuda").glob("*.cu")))
    for pattern in (r"\.sm_80\.cubin", r"\.sm_90\.cubin", r"\.sm_90\.ptx"):
        assert len(re.findall(pattern, listing.stdout)) == sources


def cuobjdump():
    """Of the CUDA toolkit, or Triton's."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = pytest.importorskip("triton")
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(bundled) if bundled.exists() else None


def test_cuda_runtime_is_not_asked_of_the_machine(extension):
    """It is linked in, and libcuda and cuBLAS are looked for when they are needed."""
    if shutil.which("ldd") is None:
        pytest.skip("ldd is not installed")
    needed = subprocess.run(["ldd", extension.__file__], capture_output=True, text=True, check=True).stdout
    assert not re.search("libcuda|libcublas", needed)


TOO_OLD = """case "$*" in *compute_90*|*sm_90*) echo "nvcc fatal   : Unsupported gpu architecture" >&2; exit 1;; esac
exec {nvcc} "$@"
"""
BROKEN = """exit 1
"""


@pytest.mark.parametrize(
    ("nvcc", "reason"),
    [(TOO_OLD, "Unsupported gpu architecture"), (BROKEN, "does not work")],
    ids=["too old", "broken"],
)
def test_without_an_nvcc_that_works_the_rest_is_built(nvcc, reason, tmp_path):
    """With a warning that says why, unless the CUDA kernels are demanded."""
    if nvcc is TOO_OLD and shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    script = tmp_path / "nvcc"
    script.write_text("#!/bin/bash\n" + nvcc.format(nvcc=shutil.which("nvcc")))
    script.chmod(0o755)
    configured = configure(tmp_path / "build", CUDACXX=str(script))
    assert configured.returncode == 0, configured.stderr
    assert "parl_core is built without its CUDA kernels" in configured.stderr and reason in configured.stderr
    assert "_native" in targets(tmp_path / "build") and "parl_cuda" not in targets(tmp_path / "build")
    demanded = configure(tmp_path / "build", "-DPARL_CUDA=ON", CUDACXX=str(script))
    assert demanded.returncode != 0 and "PARL_CUDA is ON" in demanded.stderr and reason in demanded.stderr


def test_warnings_are_errors_for_those_who_ask(tmp_path):
    """Another nvcc or compiler than ours may warn of what these do not."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    assert "-Werror" not in commands(tmp_path)
    assert "-Werror all-warnings" in commands(tmp_path, "-DPARL_WERROR=ON")
    assert "PARL_WERROR=ON" in (ROOT / "Makefile").read_text()


def commands(build, *definitions):
    """How the CUDA kernels are compiled."""
    configured = configure(build, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", *definitions)
    assert configured.returncode == 0, configured.stderr
    entries = json.loads((build / "compile_commands.json").read_text())
    return "\n".join(entry["command"] for entry in entries if entry["file"].endswith(".cu"))


def cmake(*arguments, **environment):
    """That of the environment in which the tests run, before the machine's."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if (tool := shutil.which("cmake", path=path)) is None:
        pytest.skip("cmake is not installed")
    env = os.environ | {"PATH": path} | environment
    return subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, env=env)


def configure(build, *definitions, **environment):
    pybind11 = pytest.importorskip("pybind11")
    found = (f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}")
    return cmake("-S", ROOT, "-B", build, *found, *definitions, **environment)


def targets(build):
    listing = cmake("--build", build, "--target", "help")
    assert listing.returncode == 0, listing.stderr
    return re.findall(r"\w+", listing.stdout)
