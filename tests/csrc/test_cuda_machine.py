"""Whether the CUDA kernels can run on a machine, and on which of its GPUs they are launched."""

import os

import pytest
import torch

from parl_core.ops import accelerators
from tests.csrc.test_emulation import load


@pytest.fixture
def machine():
    """Sets what the emulated driver and GPU say of themselves."""
    if not accelerators.emulated():
        pytest.skip("the CUDA kernels are not emulated")
    emulated = load(os.environ["PARL_CUDA_EMULATED"])
    yield emulated.machine
    emulated.machine()


def why_no_cuda():
    return accelerators.why_no_cuda.__wrapped__()  # not the answer for the whole process


def test_kernels_run_where_they_are_tested(cuda_kernels):
    assert why_no_cuda() is None


def test_a_driver_older_than_the_runtime_that_is_linked_in_is_told(machine):
    machine(driver=12080)
    assert why_no_cuda() == "the driver of the GPU is for CUDA 12.8, too old for kernels built by CUDA 13.0"


def test_a_gpu_that_the_kernels_are_not_compiled_for_is_told(machine):
    machine(capability=75)
    reason = why_no_cuda()
    assert "compute capability 8.0 and later" in reason and "no kernel image is available" in reason


def test_another_device_than_the_current_one_is_torchs_to_enter_and_leave(machine, monkeypatch):
    """It alone knows whether the device to come back to is in use: setting it would make a context there."""
    log = []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            log.append(("enter", self.index))

        def __exit__(self, *error):
            log.append(("leave", self.index))

    monkeypatch.setattr(torch.cuda, "device", Device)
    accelerators.cuda_library().why_not(0)  # the current one of the emulation
    assert log == []
    accelerators.cuda_library().why_not(1)
    assert log == [("enter", 1), ("leave", 1)]
