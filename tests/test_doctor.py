"""What `parl doctor` tells of a machine with a GPU and of one without."""

import pytest
import torch

from parl_core import doctor
from parl_core.ops.choice import Rule

TABLE = {
    "gae": {"reference": None, "numba": None, "cpp": None, "triton": None, "cuda": "it is broken", "graph": None},
    "vtrace": {"reference": None, "numba": "it does not implement vtrace", "cpp": "it is not built"}
    | {"triton": "it does not implement vtrace", "cuda": "it is broken", "graph": None},
    "toy, other": {"reference": None, "numba": "it does not implement toy, other", "cpp": "it is not built"}
    | {"triton": "it does not implement toy, other", "cuda": None, "graph": None},
}


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(doctor, "support_table", lambda device_type="cpu": TABLE)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(doctor, "_output", lambda *command: "580.1\n580.1\n" if "nvidia-smi" in command else None)


def test_each_reason_is_told_once_and_what_an_op_does_not_have_is_an_empty_cell(table):
    report = doctor.report()
    assert "it does not implement" not in report
    assert report.count("cpp: it is not built") == 1
    rows = {
        line.split("  ")[1]: line[14:].rstrip()
        for line in report.splitlines()
        if line.startswith(("  gae", "  vtr", "  toy"))
    }
    assert rows == {
        "gae": "+           +           +",
        "vtrace": "+                       –",
        "toy, other": "+                       –",
    }


def test_without_a_gpu_it_says_why_and_what_tests_do(table, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "why_no_triton", lambda: "no NVIDIA GPU is visible")
    report = doctor.report()
    assert "GPU none visible" in report and "Ops on CUDA tensors: none here" in report
    assert "triton: no NVIDIA GPU is visible" in report
    assert "TRITON_INTERPRET=1" in report and "PARL_CUDA_EMULATED" in report and "benchmarks/gpu.sh" in report


def test_with_a_gpu_it_tells_choices_by_size_with_their_grounds(table, gpu, monkeypatch):
    measured = Rule("cuda", "1.5 times as fast", 4096, "NVIDIA H200", "2026-11-21")
    thought = Rule("triton", "traffic decides")
    monkeypatch.setattr(doctor, "rules", lambda: {"gae": (measured, thought), "vtrace": (thought,)})
    report = doctor.report()
    assert "GPU NVIDIA H200 (sm_90), driver 580.1, nvcc not found" in report
    assert "  gae: ≤ 4096: cuda [1], > 4096: triton [2]" in report
    assert "  vtrace: any: triton [2]" in report
    assert "  toy, other: the first usable of cuda, triton, graph, reference; not measured" in report
    assert "  [1] NVIDIA H200, 2026-11-21: 1.5 times as fast" in report
    assert report.count("[2] not measured: traffic decides") == 1
    assert "cuda: it is broken" in report
