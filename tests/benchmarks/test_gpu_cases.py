"""What cases are made of: contestants that are absent and such that are broken, and peers that compile."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.case import by_backend, require
from benchmarks.gpu.cases import divergence, linearization
from benchmarks.harness.contest import prepare
from benchmarks.peers import gaussian_mlp, hypergradient
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


def test_a_second_order_product_alone_is_timed():
    """Not the gradient whose graph it needs."""
    calls = []

    def cubes(x):
        calls.append(x)
        return (x**3).sum()

    run = divergence._second_order(cubes, torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.0]))
    for _ in range(2):
        assert run().tolist() == [6.0, -12.0]
    assert len(calls) == 1


def test_the_peers_of_the_bar_of_hvps_compile(monkeypatch):
    """Traced, with derivatives and all; in the dry command nothing is."""
    modes, compile_ = [], torch.compile

    def traced(function, *, mode=None, **options):
        modes.append(mode)
        return compile_(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", traced)
    problem = gaussian_mlp.make_problem(5, 12, 2)
    found = linearization._peers(problem, "hvp")
    called, alone = (bar.peers for bar in linearization._bars(1.5))
    assert set(alone) < set(called) <= set(found)
    check = linearization._right(problem, "hvp")
    for name in called:
        assert check(found[name]()()) < 1e-5
    assert modes == [None, "reduce-overhead"]


class Reads(TorchDispatchMode):
    """How often the host waits for a number."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_eager_solve_reads_the_device_once_in_an_iteration(monkeypatch):
    system = hypergradient.System(hypergradient.make_problem(6, 2, 500.0))
    products, product = [], system.product
    monkeypatch.setattr(system, "product", lambda vector: products.append(1) or product(vector))
    with Reads() as reads:
        solution = hypergradient.plain_cg(system)
    assert len(products) > 2 and reads.count == len(products) + 1
    residual = system.rhs - product(solution)
    assert residual.norm() < 1.05 * hypergradient.RTOL * system.rhs.norm()
