"""Every public op where shapes are known and numbers are not: under torch.compile, with fake tensors, on an accelerator.

A new op fails here until it has a case in `CASES`.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from parl_core import ops
from tests.host_reads import no_host_reads

STEPS, PER_STEP = 7, "T"


class Case(NamedTuple):
    """An op with inputs to differentiate; `shapes` name the number of steps "T" where it comes first."""

    call: Callable[..., Tensor | tuple[Tensor, ...]]  # (offsets, *inputs)
    shapes: tuple[tuple[int | str, ...], ...]


def layers(*tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    return list(tensors[::2]), list(tensors[1::2])


def some_actions(logits: Tensor) -> Tensor:
    return torch.arange(logits.shape[0], device=logits.device) % 3


T = PER_STEP
CASES = {
    "discounted_returns": Case(lambda o, r: ops.discounted_returns(r, 0.9, o), ((T,),)),
    "prefix_sum": Case(lambda o, v: ops.prefix_sum(v, o), ((T,),)),
    "linear_recurrence": Case(lambda o, x, c: ops.linear_recurrence(x, c, o), ((T,), (T,))),
    "linear_recurrence, rows": Case(lambda _, x, c: ops.linear_recurrence(x, c, reverse=True), ((T, 3), (T, 3))),
    "gae": Case(lambda o, r, v, b: ops.gae(r, v, 0.9, 0.8, o, bootstrap=b), ((T,), (T,), (2,))),
    "td_lambda": Case(lambda o, r, v, b: ops.td_lambda(r, v, 0.9, 0.8, o, bootstrap=b), ((T,), (T,), (2,))),
    "vtrace": Case(lambda o, x, r, v, b: tuple(ops.vtrace(x, r, v, 0.9, o, bootstrap=b)), ((T,), (T,), (T,), (2,))),
    "f_divergence": Case(lambda o, x: ops.f_divergence(x, "kl", o), ((T,),)),
    "f_divergence, weighted": Case(
        lambda o, x, w: ops.f_divergence(x, "jensen_shannon", o, weights=w.abs(), on_policy=True), ((T,), (2,))
    ),
    "f_divergence, self-normalized": Case(
        lambda o, x: ops.f_divergence(x, "alpha", o, alpha=0.3, self_normalized=True), ((T,),)
    ),
    "f_divergence_bound": Case(lambda _, p, q: ops.f_divergence_bound(p, q, "kl"), ((T,), (T,))),
    "categorical_f_divergence": Case(lambda _, p, q: ops.categorical_f_divergence(p, q, "jeffreys"), ((T, 3), (T, 3))),
    "categorical_log_prob": Case(lambda _, z: ops.categorical_log_prob(z, some_actions(z)), ((T, 3),)),
    "categorical_fisher": Case(lambda _, z, tangent: ops.categorical_fisher(z, tangent), ((T, 3), (T, 3))),
    "gaussian_log_prob": Case(lambda _, a, m, s: ops.gaussian_log_prob(a, m, s), ((T, 2), (T, 2), (T, 2))),
    "gaussian_log_prob, squashed": Case(
        lambda _, a, m, s: ops.gaussian_log_prob(a.tanh(), m, s, squash=True), ((T, 2), (T, 2), (2,))
    ),
    "gaussian_f_divergence": Case(
        lambda _, p, q: ops.gaussian_f_divergence(p, q, "squared_hellinger"), ((T, 4), (T, 4))
    ),
    "preference_loss": Case(
        lambda o, first, second, y: ops.preference_loss(first, second, y.sigmoid(), o, o).loss,
        ((T,), (T,), (2,)),
    ),
    "preference_loss, rows": Case(
        lambda _, first, second, y: ops.preference_loss(first, second, y.sigmoid(), reduction="none").loss,
        ((T, 3), (T, 3), (T,)),
    ),
    "ensemble_rewards": Case(
        lambda _, x, *p: ops.ensemble_rewards(x, *layers(*p)), ((T, 3), (2, 3, 4), (2, 1, 4), (2, 4, 1), (2, 1, 1))
    ),
}


SCANS = ("discounted_returns", "prefix_sum", "linear_recurrence", "gae", "td_lambda", "vtrace")


@pytest.fixture(params=CASES)
def case(request) -> Case:
    torch._dynamo.reset()
    return CASES[request.param]


def offsets_of(steps: int) -> Tensor:
    return torch.tensor([0, 3, steps])


def inputs_of(case: Case, steps: int = STEPS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(steps)
    shapes = [[steps if size == PER_STEP else size for size in shape] for shape in case.shapes]
    return [torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def total(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A number of all that an op returns, with a second derivative whatever the op's own."""
    return sum(output.square().sum() for output in ((outputs,) if isinstance(outputs, Tensor) else outputs))


def derivatives(value: Tensor, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The gradient, and that of its squared length."""
    first = torch.autograd.grad(value, inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, allow_unused=True)
    return list(first), [torch.zeros_like(x) if g is None else g for g, x in zip(second, inputs, strict=True)]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_every_public_op_has_a_case():
    no_ops = {"available_backends", "backend", "support_table"}
    functions = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))} - no_ops
    assert functions == {name.split(",")[0] for name in CASES}


def test_compiled_in_one_graph_forwards_and_backwards(case):
    offsets, inputs = offsets_of(STEPS), inputs_of(case)
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
    expected, found = total(case.call(offsets, *inputs)), total(compiled(offsets, *inputs))
    close([found], [expected])
    close(list(torch.autograd.grad(found, inputs)), list(torch.autograd.grad(expected, inputs)))


def test_compiled_and_differentiated_twice(case):
    """By Dynamo alone: what lies below it, AOTAutograd, takes no second derivative of any program."""
    offsets, inputs = offsets_of(STEPS), inputs_of(case)
    compiled = torch.compile(case.call, fullgraph=True, backend="eager")
    expected = derivatives(total(case.call(offsets, *inputs)), inputs)
    found = derivatives(total(compiled(offsets, *inputs)), inputs)
    for one, other in zip(found, expected, strict=True):
        close(one, other)
    assert any(g.count_nonzero() for g in expected[1])


def test_one_compilation_serves_any_number_of_steps(case):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.call, fullgraph=True, backend=counter)
    for steps in (STEPS, 12, 31):
        offsets, inputs = offsets_of(steps), inputs_of(case, steps)
        for tensor, shape in zip(inputs, case.shapes, strict=True):
            if shape[0] == PER_STEP:
                torch._dynamo.mark_dynamic(tensor, 0)
        expected, found = total(case.call(offsets, *inputs)), total(compiled(offsets, *inputs))
        close(list(torch.autograd.grad(found, inputs)), list(torch.autograd.grad(expected, inputs)))
    assert counter.frame_count == 1


def test_shapes_on_a_gpu_need_no_numbers(case):
    """Fake tensors raise where a number is read. They need no GPU, and no build of torch for one."""
    expected = case.call(offsets_of(STEPS), *(tensor.detach() for tensor in inputs_of(case)))
    with FakeTensorMode():
        offsets = torch.empty(3, dtype=torch.int64, device="cuda")
        inputs = [torch.empty(tensor.shape, device="cuda") for tensor in inputs_of(case)]
        found = case.call(offsets, *inputs)
    for one, other in zip(*((x,) if isinstance(x, Tensor) else x for x in (found, expected)), strict=True):
        assert one.shape == other.shape and one.dtype == torch.float32 and one.device.type == "cuda"


def test_shapes_of_derivatives_need_no_numbers(case):
    with FakeTensorMode() as mode:
        offsets, *inputs = (mode.from_tensor(tensor) for tensor in (offsets_of(STEPS), *inputs_of(case)))
        with pytest.raises(DataDependentOutputException):
            offsets[-1].item()
        for found in derivatives(total(case.call(offsets, *inputs)), inputs):
            assert [one.shape for one in found] == [one.shape for one in inputs]


# The references of the scans pad to the longest trajectory, whose length they read.
BY_BACKEND = [(name, None) for name in CASES] + [
    (name, "reference") for name in CASES if name.split(",")[0] not in SCANS
]


@pytest.mark.parametrize(("case", "backend"), BY_BACKEND, indirect=["case"])
def test_on_an_accelerator_a_second_call_reads_no_number(case, backend, monkeypatch):
    """Tensors on the CPU stand in for those on an accelerator."""
    for module in ("offsets", "ops.f_divergence", "ops.categorical_log_prob"):
        monkeypatch.setattr(importlib.import_module(f"parl_core.{module}"), "reads_are_free", lambda device: False)
    offsets, inputs = offsets_of(STEPS), inputs_of(case)
    with ops.backend(backend) if backend else contextlib.nullcontext():
        derivatives(total(case.call(offsets, *inputs)), inputs)
        with no_host_reads():
            case.call(offsets, *(tensor.detach() for tensor in inputs))
            derivatives(total(case.call(offsets, *inputs)), inputs)
            torch.autograd.grad(total(case.call(offsets, *inputs)), inputs)


@pytest.mark.gpu
def test_captured_in_a_cuda_graph(case, device):
    """What a call before has seen is not looked at; replays follow the numbers in the inputs' memory."""
    offsets = offsets_of(STEPS).to(device)
    inputs = [tensor.detach().float().to(device).requires_grad_() for tensor in inputs_of(case)]

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(total(case.call(offsets, *inputs)), inputs)

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        captured = gradients()
    with torch.no_grad():
        for tensor in inputs:
            tensor.mul_(0.5)
    graph.replay()
    for found, expected in zip(captured, gradients(), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.gpu
def test_compiled_into_cuda_graphs(device):
    """torch.compile copies inputs to places of its own, so that these offsets are looked at by the graph."""
    case = CASES["gae"]
    compiled = torch.compile(case.call, fullgraph=True, mode="reduce-overhead")
    for step in range(5):
        offsets = torch.tensor([0, step, STEPS], device=device)
        inputs = [(tensor.detach() + step).float().to(device).requires_grad_() for tensor in inputs_of(case)]
        torch.compiler.cudagraph_mark_step_begin()
        found = torch.autograd.grad(total(compiled(offsets, *inputs)), inputs)
        expected = torch.autograd.grad(total(case.call(offsets, *inputs)), inputs)
        torch.testing.assert_close([one.clone() for one in found], list(expected))
