"""What holds for every test.

One thread: the problems are tiny, and threads of several processes only wait for each other. Ctrl-C is heard: a shell starts
what runs in the background with that signal ignored, and so would every process be that a test starts.

Without an NVIDIA GPU Triton's kernels are interpreted, on the CPU, and those in CUDA C++ are emulated there, where their
emulation has been built; what needs the GPU itself is marked `gpu`.
"""

import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # poisoned memory wants deterministic products
import torch

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)

HAS_GPU = torch.cuda.is_available()
EMULATED = next(Path(__file__).parent.parent.glob("build/emulated/_emulated*.so"), None)
if not HAS_GPU:
    # Read where kernels are defined and ops registered.
    os.environ["TRITON_INTERPRET"] = "1"
    if EMULATED is not None:
        os.environ.setdefault("PARL_CUDA_EMULATED", str(EMULATED))


def pytest_collection_modifyitems(items):
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_terminal_summary(terminalreporter):
    skipped = sum("needs an NVIDIA GPU" in str(report.longrepr) for report in terminalreporter.stats.get("skipped", []))
    if skipped:
        terminalreporter.write_line(f"{skipped} tests need an NVIDIA GPU and did not run.")


@pytest.fixture
def device():
    """Where kernels for GPUs run: on one, or interpreted and emulated on the CPU."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def cuda_kernels():
    """The module of the CUDA kernels: those of the GPU, or emulated."""
    from parl_core.ops.accelerators import cuda_library, why_no_cuda  # which reads what is set above

    if reason := why_no_cuda():
        pytest.skip(reason if HAS_GPU else "the CUDA kernels are not built for the CPU; do that with: make emulated")
    return cuda_library()


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request):
    """Kernels in every instruction set of this machine."""
    native = pytest.importorskip("parl_core._native")
    if request.param not in native.isas():
        pytest.skip(f"this machine has no {request.param}")
    before = native.isa()
    native.use_isa(request.param)
    yield request.param
    native.use_isa(before)


@pytest.fixture(params=[1, 2])
def threads(request):
    """One thread, and two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def poisoned_memory():
    """What torch allocates without a value is NaN, so that a number that no kernel wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
