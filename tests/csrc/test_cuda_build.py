"""What the extension carries for GPUs."""

import re
import shutil
import subprocess
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
