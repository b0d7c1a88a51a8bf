"""Solves as CUDA graphs: nothing in them is read, and a replay solves for the numbers of the moment."""

from __future__ import annotations

import contextlib
import gc
import importlib
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import parl_core as parl
from parl_core.hypergrad import curvature as curvatures
from parl_core.hypergrad.solvers import Preconditioner, capture, drive, neumann, nystrom
from parl_core.hypergrad.solvers.system import System
from parl_core.ops.accelerators import emulated
from tests.hypergrad.native_policies import make_policy, make_steps
from tests.hypergrad.systems import F64, spd

SOLVERS = {
    "CG": lambda limit: parl.CG(rtol=1e-9, max_iterations=limit),
    "PCG": lambda limit: parl.PCG(rtol=1e-9, max_iterations=limit),
    "NystromPCG": lambda limit: parl.NystromPCG(rank=6, rtol=1e-9, max_iterations=limit),
    "MINRES": lambda limit: parl.MINRES(rtol=1e-9, max_iterations=limit),
    "Neumann": lambda limit: parl.Neumann(rtol=1e-9, max_iterations=20 * limit),
}
CURVATURES = {
    "Fisher": parl.Fisher(0.3, damping=20.0),
    "Fisher of steps": parl.Fisher(0.3, damping=50.0, scores="steps"),
    "Fisher of trajectories": parl.Fisher(0.3, damping=500.0, scores="trajectories"),
    "ScoreHessian": parl.ScoreHessian(temperature=1e-4, damping=50.0),
    "LogProbHessian": parl.LogProbHessian(damping=50.0),
}
linearizations = importlib.import_module("parl_core.hypergrad.linearize")  # the function has its name
LENGTHS = (30, 0, 7, 1, 25)


class Matrix:
    """v ↦ A v with an approximate inverse, for PCG."""

    def __init__(self, matrix):
        self.matrix = matrix

    def __call__(self, vector):
        return self.matrix @ vector

    def preconditioner(self, extra=0.0):
        inverse = 1.0 / (torch.diagonal(self.matrix) + extra)
        return Preconditioner(lambda residual: inverse * residual, cost=0.0)


class Paid(Matrix):
    """The same, saying what a product costs and what its approximate inverse does."""

    cost = 2.0

    def preconditioner(self, extra=0.0):
        return Preconditioner(super().preconditioner(extra).apply, cost=7.0)


def well_conditioned(device, seed=0):
    return tuple(tensor.to(device) for tensor in spd(20, 10.0, seed=seed))


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_replay_solves_for_the_numbers_of_the_moment(device, name, rows):
    matrix, rhs = well_conditioned(device)
    if rows is not None:
        rhs = torch.stack([(k + 1) * rhs.roll(k) for k in range(rows)])
    solve = parl.capture_solve(SOLVERS[name](60), lambda: Matrix(matrix), torch.zeros_like(rhs), torch.zeros_like(rhs))
    for seed in range(3):
        matrix.copy_(well_conditioned(device, seed)[0])
        for b, x0 in ((rhs, None), (-2 * rhs, rhs / 3)):
            solution = solve(b, x0)
            exact = torch.linalg.solve(matrix, b, left=False) if b.dim() == 2 else torch.linalg.solve(matrix, b)
            torch.testing.assert_close(solution.value, exact, rtol=1e-7, atol=1e-7)
            assert solution.status is parl.Status.CONVERGED
            assert solution.residuals.shape[0] == solution.iterations + 1
            first = 1.0 if x0 is None else (b - x0 @ matrix).norm(dim=-1) / b.norm(dim=-1)
            torch.testing.assert_close(solution.residuals[0], torch.as_tensor(first).to(b).expand(b.shape[:-1]))


def test_solutions_are_the_callers(device):
    """Neither the next replay nor a change of the right-hand side is seen in an earlier solution."""
    matrix, rhs = well_conditioned(device)
    solve = parl.capture_solve(parl.CG(max_iterations=40), lambda: Matrix(matrix), rhs)
    first = solve(rhs)
    value, residuals = first.value.clone(), first.residuals.clone()
    other = rhs.clone()
    solve(other.mul_(3.0))
    other.zero_()
    assert torch.equal(first.value, value) and torch.equal(first.residuals, residuals)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_replay_names_what_went_wrong(device, bad):
    matrix, rhs = well_conditioned(device)
    solve = parl.capture_solve(parl.CG(max_iterations=40), lambda: Matrix(matrix), rhs, rhs)
    spoilt = rhs.clone()
    spoilt[2] = bad
    assert solve(spoilt).status is parl.Status.NON_FINITE_RHS
    assert solve(rhs, spoilt).status is parl.Status.NON_FINITE_START
    matrix.fill_(bad)
    assert solve(rhs).status is parl.Status.NON_FINITE_OPERATOR
    matrix.copy_(torch.eye(20, dtype=F64))
    assert solve(rhs).status is parl.Status.CONVERGED


def test_an_inconsistent_system_goes_on_after_the_graph(device):
    diagonal = torch.tensor([0.0, 1.0, -2.0, 3.0], dtype=F64, device=device)
    rhs = torch.ones_like(diagonal)
    solution = parl.capture_solve(parl.MINRES(), lambda: lambda v: diagonal * v, rhs)(rhs)
    assert solution.status is parl.Status.INCONSISTENT
    torch.testing.assert_close(solution.value, torch.tensor([0.0, 1.0, -0.5, 1 / 3], dtype=F64, device=device))


def test_bad_arguments_are_named():
    rhs = torch.ones(3)
    for solver in (parl.Woodbury(), parl.Dense()):
        with pytest.raises(TypeError, match=f"solver must be CG.*got {type(solver).__name__}"):
            parl.capture_solve(solver, lambda: lambda v: v, rhs)
    with pytest.raises(ValueError, match="rhs must be a real floating-point vector"):
        parl.capture_solve(parl.CG(), lambda: lambda v: v, torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="x0 must be like rhs"):
        parl.capture_solve(parl.CG(), lambda: lambda v: v, rhs, torch.ones(4))
    solve = parl.capture_solve(parl.CG(), lambda: lambda v: v, rhs)
    with pytest.raises(ValueError, match="rhs must be like rhs"):
        solve(torch.ones(4))
    with pytest.raises(ValueError, match=r"rhs must be like rhs, torch.float32 of shape \(3,\) on cpu, got .* on meta"):
        solve(torch.ones(3, device="meta"))
    with pytest.raises(ValueError, match=r"x0 must be like rhs, .* on cpu, got .* on meta"):
        parl.CG()(lambda v: v, rhs, torch.ones(3, device="meta"))
    with pytest.raises(ValueError, match="captured without"):
        solve(rhs, rhs)


@pytest.fixture
def capturing(monkeypatch):
    """The host believes that a CUDA graph is captured."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


@pytest.mark.parametrize(
    ("head", "curvature", "solver"),
    [*(("state", name, parl.CG) for name in CURVATURES), ("categorical", "ScoreHessian", parl.MINRES)],
)
def test_no_number_is_needed_to_linearize_and_solve(capturing, monkeypatch, head, curvature, solver):
    """On meta tensors, which have none: asking for one raises, as the reference of scans does and no kernel."""
    for module in (curvatures, linearizations):
        monkeypatch.setattr(module, "discounted_returns", lambda values, *_: values.clone())
    monkeypatch.setattr(linearizations, "prefix_sum", lambda values, *_: values.clone())
    policy = make_policy(head)
    given = make_steps(policy, LENGTHS)
    policy = policy.to("meta")
    trajectories = parl.Trajectories(*(t.to("meta") for t in (given.observations, given.actions, given.offsets)))
    rewards = torch.empty(given.num_steps, dtype=F64, device="meta")
    linearization = parl.linearize(policy, trajectories)
    rhs = linearization.vjp(rewards)
    system = System(CURVATURES[curvature].operator(linearization, rewards, 0.9), rhs, rhs)
    monkeypatch.setattr(drive, "CHECK_EVERY", 2)
    read = solver(max_iterations=3).prepare(system)(system)
    assert system.products == 1 + 3 + 2
    with pytest.raises(NotImplementedError, match="meta"):
        read()


class Stream:
    def wait_stream(self, other):
        assert isinstance(other, Stream)


@pytest.fixture
def log(monkeypatch):
    """What CUDA is asked for, by graphs that repeat nothing: after a replay all is as it was at capture."""
    events = []

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            assert (pool, capture_error_mode) == ("pool", "thread_local")
            events.append("begin")

        def capture_end(self):
            events.append("end")

        def replay(self):
            events.append("replay")

    for name, value in {
        "device": lambda device: contextlib.nullcontext(),
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": Stream,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph_pool_handle": lambda: "pool",
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return events


@pytest.mark.parametrize("name", SOLVERS)
def test_the_way_of_a_capture(log, name):
    matrix, rhs = well_conditioned("cpu")
    builds = []

    def build():
        builds.append(None)
        return Matrix(matrix)

    replay = capture._capture(SOLVERS[name](60), build, rhs, None)
    assert len(builds) == 3 and log == ["begin", "end"]
    log.clear()
    for _ in range(2):
        solution, expected = replay(), SOLVERS[name](60)(Matrix(matrix), rhs)
        assert solution.status is expected.status is parl.Status.CONVERGED
        torch.testing.assert_close(solution.value, expected.value, rtol=1e-7, atol=1e-9)
        assert 0 < solution.products <= expected.products
    assert log == 2 * ["replay"]


@pytest.fixture
def emulated_kernels(cuda_kernels):
    if not emulated():
        pytest.skip("in place of a GPU, where there is one")


@pytest.mark.parametrize(("condition", "turns"), [(2.0, 1), (1e9, 4)])
def test_a_loop_is_a_graph_that_is_launched_until_the_solve_is_over(emulated_kernels, log, condition, turns):
    matrix, rhs = spd(30, condition)
    with parl.backend("cuda"):
        replay = capture._capture(parl.CG(rtol=1e-6, max_iterations=60), lambda: Matrix(matrix), rhs, None)
    assert log == 3 * ["begin", "end"]
    log.clear()
    for _ in range(2):
        solution = replay()
        assert log == (1 + turns) * ["replay"]
        assert solution.products == (15 + 1) * turns
        assert solution.iterations <= 2 * 15  # that of the first turn and of the graph to repeat
        log.clear()
    assert (solution.status is parl.Status.CONVERGED) == (turns == 1)


def test_a_solve_of_one_turn_is_one_graph(emulated_kernels, log):
    matrix, rhs = spd(30, 2.0)
    with parl.backend("cuda"):
        capture._capture(parl.CG(max_iterations=16), lambda: Matrix(matrix), rhs, None)
    assert log == ["begin", "end"]


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_the_loop_finds_the_operator_made(emulated_kernels, log, warm):
    """What an operator makes at its first product is in the first graph, not in the one that is launched repeatedly."""
    matrix, rhs = spd(30, 1e9)

    def build():
        made = []

        def operator(vector):
            if not made:
                log.append("made")
                made.append(matrix.clone())
            return made[0] @ vector

        return operator

    with parl.backend("cuda"):
        capture._capture(parl.CG(rtol=1e-6, max_iterations=60), build, rhs, rhs if warm else None)
    assert log == ["made", "made", "begin", "made", "end", *(2 * ["begin", "end"])]


@pytest.fixture
def made_before(monkeypatch):
    """What solvers make before a capture, for graphs to read, as weak references."""
    references = []

    def watch(owner, name, tensors_of):
        original = getattr(owner, name)

        def watched(*arguments):
            result = original(*arguments)
            references.extend(map(weakref.ref, tensors_of(result)))
            return result

        monkeypatch.setattr(owner, name, watched)

    watch(neumann, "_random_vector", lambda vector: [vector])
    watch(nystrom._Sketch, "preconditioner", enclosed_tensors)
    return references


def enclosed_tensors(function):
    contents = [cell.cell_contents for cell in function.__closure__]
    return [content for content in contents if isinstance(content, torch.Tensor)]


def build_that_holds(matrix):
    """A `build` with a copy of the matrix that nobody else knows, and a weak reference to that."""
    own = matrix.clone()

    def build():
        present = 1.0 * own  # a kernel of the graph
        return lambda vector: present @ vector

    return build, weakref.ref(own)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_captured_solve_holds_what_its_graphs_read(log, made_before, name):
    matrix, rhs = well_conditioned("cpu")
    build, own = build_that_holds(matrix)
    replay = capture._capture(SOLVERS[name](60), build, rhs, None)
    del build
    gc.collect()
    assert own() is not None
    assert len(made_before) == (2 if name in ("NystromPCG", "Neumann") else 0)
    assert all(reference() is not None for reference in made_before[1:])  # the first is the first solve's alone
    del replay
    gc.collect()
    assert own() is None and all(reference() is None for reference in made_before)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SOLVERS)
def test_nobody_else_gets_the_memory_that_graphs_read(device, name):
    matrix, rhs = well_conditioned(device)
    build, _ = build_that_holds(matrix)
    solve = parl.capture_solve(SOLVERS[name](60), build, rhs)
    del build
    gc.collect()
    poison = [torch.full((size,), torch.nan, dtype=F64, device=device) for size in (6, 20, 400) for _ in range(1000)]
    solution = solve(rhs)
    del poison
    assert solution.status is parl.Status.CONVERGED
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, rhs), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("first", ["no iteration", "no convergence"])
def test_replays_neither_pay_for_a_preconditioner_nor_change_what_the_solver_keeps(log, first):
    matrix, rhs = spd(20, 100.0)
    rhs = torch.zeros_like(rhs) if first == "no iteration" else rhs
    builds = []

    def build():
        builds.append(None)
        return Paid(matrix if len(builds) < 3 else matrix.diagonal().diag())

    solver = parl.PCG(rtol=1e-9, max_iterations=1)
    replay = capture._capture(solver, build, rhs, None)
    assert solver._kept is None
    for _ in range(2):
        solution = replay()
        assert solution.status is parl.Status.CONVERGED
        assert solution.cost == 2.0 * solution.products
    assert solver._kept is None


def test_replays_leave_what_a_solver_keeps_of_another_operator(log):
    matrix, rhs = spd(20, 100.0)
    solver = parl.PCG(rtol=1e-9, max_iterations=60)
    builds = []

    def build():
        builds.append(None)
        return Paid(torch.eye(20, dtype=F64) if len(builds) < 3 else matrix)

    replay = capture._capture(solver, build, rhs, None)
    for others in (False, True):
        if others:
            solver(Paid(matrix), rhs)
            kept = solver._kept
        assert replay().iterations > 10
        assert solver._kept is (kept if others else None)


def test_replays_leave_a_sketch_that_is_not_theirs(log):
    matrix, rhs = spd(20, 10.0)
    present = matrix * torch.nan
    solver = parl.NystromPCG(rank=6, max_iterations=60)
    replay = capture._capture(solver, lambda: Matrix(1.0 * present), rhs, None)
    solver(Matrix(matrix), rhs)
    kept = solver._sketch
    assert replay().status is parl.Status.NON_FINITE_OPERATOR
    assert solver._sketch is kept is not None


def test_an_error_ends_the_capture(log):
    rhs, builds = torch.ones(3), []

    def build():
        builds.append(None)
        if len(builds) == 3:
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda v: v

    with pytest.raises(RuntimeError, match=r"cannot be captured.*not permitted.*boolean indexing"):
        capture._capture(parl.CG(), build, rhs, None)
    assert log == ["begin", "end"]


@pytest.mark.parametrize("backend", ["reference", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("head", "curvature"), [*(("state", name) for name in CURVATURES), ("categorical", "ScoreHessian")]
)
def test_a_linearization_in_the_graph_follows_parameters_and_data(device, head, curvature, backend):
    torch.manual_seed(0)
    policy = make_policy(head)
    given = make_steps(policy, LENGTHS)
    policy = policy.to(device)
    observations, actions, offsets = (t.to(device) for t in (given.observations, given.actions, given.offsets))
    trajectories = parl.Trajectories(observations, actions, offsets)
    rewards = 1e-3 * torch.randn(given.num_steps, dtype=F64, device=device)

    def build():
        with parl.backend(backend):
            linearization = parl.linearize(policy, trajectories)
        return CURVATURES[curvature].operator(linearization, rewards, 0.9)

    rhs = parl.linearize(policy, trajectories).vjp(rewards)
    solve = parl.capture_solve(parl.CG(rtol=1e-10), build, rhs)
    for _ in range(2):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        observations.add_(0.1 * torch.randn_like(observations))
        rewards.normal_(std=1e-3)
        solution, expected = solve(rhs), parl.CG(rtol=1e-10)(build(), rhs)
        assert solution.status is expected.status is parl.Status.CONVERGED
        torch.testing.assert_close(solution.value, expected.value, rtol=1e-6, atol=1e-8)


@pytest.mark.gpu
def test_another_thread_may_ask_for_memory_meanwhile(device):
    matrix, rhs = well_conditioned(device)
    anew = []

    def build():
        worker = threading.Thread(target=lambda: anew.append(torch.empty(2**28, dtype=torch.uint8, device=device)))
        worker.start()
        worker.join()
        return Matrix(matrix)

    solution = parl.capture_solve(parl.CG(rtol=1e-9), build, rhs)(rhs)
    assert len(anew) == 3
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, rhs), rtol=1e-7, atol=1e-7)


@pytest.mark.gpu
def test_what_cannot_be_captured_says_so():
    rhs = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        parl.capture_solve(parl.CG(), lambda: lambda v: v * float(v.norm()), rhs)


def test_the_page_tells_how_many_operations_an_iteration_takes(monkeypatch):
    """Of the loop on an accelerator, beside a product that takes none."""

    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.number += 1
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(drive, "reads_are_free", lambda device: False)
    numbers = []
    for iterations in (10, 11):
        with parl.backend("reference"), Count() as count:
            parl.CG(rtol=1e-30, max_iterations=iterations)(lambda v: v, torch.ones(50, dtype=torch.float64))
        numbers.append(count.number)
    page = (Path(__file__).parents[2] / "docs" / "captured_solves.md").read_text()
    assert f"| {numbers[1] - numbers[0]} operations of torch, counted |" in page
