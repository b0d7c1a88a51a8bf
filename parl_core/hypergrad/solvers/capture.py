"""A whole solve as CUDA graphs: captured once, then replayed with other numbers in the same memory.

How this differs from `torch.cuda.graph` around a solver, and why:
1. A solver's computations are told apart from what reads their outcome (`Recordable`). The graph holds the first, the host
   reads once after each replay, and the `Solution` is that of an ordinary call.
2. The operator is built inside the graph. Autograd runs a backward pass on the stream of its forward pass, so that a graph
   cannot take products of an operator that was built elsewhere; and what is built inside is built anew by each replay,
   from parameters and data as they are then.
3. What takes the host, such as a preconditioner, is made before, by a complete solve that also warms up the stream. A graph
   holds addresses only, and what lies outside of its memory pool is kept for it: `build`, and what was made before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .repeat import repeating
from .solution import LinearOperator, Solution, Solver
from .system import Recordable, System, check_vectors


def capture_solve(
    solver: Solver, build: Callable[[], LinearOperator], rhs: Tensor, x0: Tensor | None = None
) -> CapturedSolve:
    """Capture `solver(build(), rhs, x0)` for right-hand sides and starts like these, to be replayed by calling the result.

    On an NVIDIA GPU a replay launches a CUDA graph, where the solver itself would launch dozens of kernels an iteration,
    and reads how the solve ended. With `CG` and one right-hand side it looks every 16 iterations or sooner whether it is
    over; the other solvers run all of their `max_iterations` in one graph, with the iterate frozen once they are over.
    Elsewhere, also on the CPU, a replay builds and solves as usual, so that a program can be the same everywhere.

    >>> import torch, parl_core as parl
    >>> diagonal, rhs = torch.tensor([1.0, 2.0, 4.0]), torch.ones(3)
    >>> solve = parl.capture_solve(parl.CG(), lambda: lambda v: diagonal * v, rhs)
    >>> solve(rhs).value
    tensor([1.0000, 0.5000, 0.2500])
    >>> _ = diagonal.copy_(torch.tensor([1.0, 2.0, 8.0]))
    >>> solve(2 * rhs).value
    tensor([2.0000, 1.0000, 0.2500])

    In a bilevel loop the operator comes from a linearization, which a replay makes anew at the policy's parameters:

        def build():
            linearization = parl.linearize(policy, trajectories)
            return parl.Fisher(temperature=0.1, damping=1e-3).operator(linearization, rewards, discount)

        solve = parl.capture_solve(parl.CG(), build, b)
        for …:
            optimizer.step()                  # changes the policy's parameters where they are
            observations.copy_(…)             # those that `trajectories` was made of; likewise actions and rewards
            w = solve(b).value

    Whatever is to change must be written into the tensors that were there at capture (`copy_`). A tensor must not be put in
    the place of one of them: the graphs go on reading that one's memory, which may be freed. A number of Python's, such as
    a damping, stays what it was, and so do the offsets of trajectories.

    Args:
        solver: CG, PCG, NystromPCG, MINRES or Neumann. A preconditioner or a sketch is made before the capture and serves
            all replays; capture again once `iterations` has grown. MINRES goes on outside the graph where a system
            ends as inconsistent.
        build: makes the operator of tensors on rhs's device. While it is captured neither it nor a product may read the
            device, and what they need from the host must be on the device before.
            Damping must be a number: choosing it reads. `linearize` leaves out its checks then, which it has made in the
            solve before.
        rhs: (P,) or (K, P); the shape, dtype and device of the right-hand sides to come.
        x0: given, replays may start from an x0 too; each costs one product more, also from zero.

    Raises:
        TypeError: the solver reads the device between its computations, as `Woodbury` and `Dense` do.
        RuntimeError: the computations cannot be captured.
    """
    return CapturedSolve(solver, build, rhs, x0)


class CapturedSolve:
    """What `capture_solve` returns."""

    def __init__(
        self, solver: Solver, build: Callable[[], LinearOperator], rhs: Tensor, x0: Tensor | None = None
    ) -> None:
        if not callable(getattr(solver, "prepare", None)):
            raise TypeError(
                "solver must be CG, PCG, NystromPCG, MINRES or Neumann, whose iterations read nothing; "
                f"got {type(solver).__name__}"
            )
        check_vectors("rhs", rhs)
        if x0 is not None:
            check_vectors("x0", x0, like=rhs)
        self._rhs = rhs.detach().clone()
        self._x0 = None if x0 is None else x0.detach().clone()
        if rhs.device.type == "cuda":
            self._replay = _capture(cast(Recordable, solver), build, self._rhs, self._x0)
        else:
            self._replay = lambda: solver(build(), self._rhs, self._x0)

    def __call__(self, rhs: Tensor, x0: Tensor | None = None) -> Solution:
        """The solution for rhs, from x0 or from zero, with the operator as `build` makes it of the present numbers.

        Raises:
            ValueError: a vector of another shape, dtype or device than at capture, or an x0 where there was none.
        """
        check_vectors("rhs", rhs, like=self._rhs)
        if x0 is not None:
            if self._x0 is None:
                raise ValueError("x0 came to a solve that was captured without one: pass an x0 to capture_solve too")
            check_vectors("x0", x0, like=self._rhs)
            self._x0.copy_(x0.detach())
        elif self._x0 is not None:
            self._x0.zero_()
        self._rhs.copy_(rhs.detach())
        return self._replay()


def _capture(
    solver: Recordable, build: Callable[[], LinearOperator], rhs: Tensor, x0: Tensor | None
) -> Callable[[], Solution]:
    """The computations as graphs on rhs's device; what it returns launches them and reads the outcome."""
    with torch.cuda.device(rhs.device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # what the first one makes and keeps, the second one and the graphs find
                system = System(build(), rhs, x0)
                launch = solver.prepare(system)
                launch(system)()
            graphs = _Graphs(read=(build, launch))
            try:
                with graphs.recording():
                    system = graphs.system = System(build(), rhs, x0)
                    read = launch(system)
            except RuntimeError as error:
                raise RuntimeError(
                    f"the solve cannot be captured in a CUDA graph: {error}. Neither `build` nor the operator that it makes "
                    "may read the device (.item(), bool(…), boolean indexing) or use autograd graphs made outside of `build`"
                ) from error
        torch.cuda.current_stream().wait_stream(stream)

    def replay() -> Solution:
        graphs.replay()
        solution = read()
        return dataclasses.replace(solution, residuals=solution.residuals.clone())

    return replay


class _Part(NamedTuple):
    graph: torch.cuda.CUDAGraph
    products: int  # of one launch
    at_most: int
    going: Tensor | None  # () 0 where a loop is over


class _Graphs:
    """The graphs of a solve in one memory pool, in the order of their launches: one, or with a loop three.

    They keep alive what holds the tensors outside of the pool that they `read`.
    """

    system: System | None = None

    def __init__(self, read: tuple[object, ...]) -> None:
        self._read = read
        self._parts: list[_Part] = []
        self._pool = torch.cuda.graph_pool_handle()
        self._open: torch.cuda.CUDAGraph | None = None
        self._counted = 0

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Within this context the current stream's computations are captured, a loop's body once."""
        torch.cuda.synchronize()
        gc.collect()  # a graph that is freed meanwhile would spoil the capture
        self._begin()
        try:
            with repeating(self._loop):
                yield
        except BaseException:
            with contextlib.suppress(RuntimeError):  # which would say no more than that the capture is spoilt
                if self._open is not None:
                    self._open.capture_end()
            raise
        self._end()

    def replay(self) -> None:
        """Launch all; the host waits for nothing but the turns of a loop."""
        assert self.system is not None
        self.system.products = 0
        for part in self._parts:
            for _ in range(part.at_most):
                if part.going is not None and not bool(part.going):
                    break
                part.graph.replay()
                self.system.products += part.products

    def _loop(self, body: Callable[[], None], *, at_most: int, going: Tensor) -> None:
        self._end()
        self._begin()
        body()
        self._end(at_most, going)
        self._begin()

    def _begin(self) -> None:
        self._open = torch.cuda.CUDAGraph()
        # What other threads do, such as asking CUDA for memory, is no part of the solve and must not spoil it.
        self._open.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _end(self, at_most: int = 1, going: Tensor | None = None) -> None:
        assert self._open is not None
        graph, self._open = self._open, None
        graph.capture_end()
        products = 0 if self.system is None else self.system.products
        self._parts.append(_Part(graph, products - self._counted, at_most, going))
        self._counted = products
