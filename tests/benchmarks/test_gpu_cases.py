"""What cases are made of: contestants that are absent and such that are broken, and peers that compile."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.case import by_backend, require
from benchmarks.harness.contest import prepare
from parl_core.ops import BackendError, f_divergence, registry


def withheld(make):
    """What is told of a contestant, by backend."""
    return {racer.entry.name: racer.entry.withheld for racer in prepare(lambda answer: 0.0, by_backend(make))}


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def raising(reason):
    def make(backend):
        raise BackendError(f"an op: backend '{backend}' cannot be used: {reason}.")

    return make


BROKEN = "its kernel cannot be loaded (SyntaxError: no)"


def test_on_a_gpu_only_what_an_op_does_not_have_is_absent(on_a_gpu):
    assert withheld(raising("it does not implement an op"))["cuda"].startswith("not here: ")
    assert withheld(raising(BROKEN))["cuda"].startswith("failed: BackendError: ")


def test_elsewhere_a_backend_may_be_missing():
    assert withheld(raising(BROKEN))["cuda"].startswith("not here: ")


def test_what_an_op_does_not_have_is_told_by_the_registry(on_a_gpu, monkeypatch):
    """By an argument, and where a context would leave the op alone."""
    monkeypatch.setitem(registry._WHY_UNAVAILABLE, "cuda", lambda: None)
    log_ratio = torch.zeros(3)
    found = withheld(lambda backend: lambda: f_divergence(log_ratio, "kl", backend=backend))
    assert found["reference"] is None and "it does not implement" in found["cuda"] and "not here" in found["cuda"]

    def make(backend):
        require("f_divergence", backend, torch.device("cpu"))
        return lambda: log_ratio

    assert withheld(make)["cuda"] == "not here: f_divergence: it does not implement f_divergence"
