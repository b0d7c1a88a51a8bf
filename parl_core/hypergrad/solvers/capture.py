"""A whole solve as one CUDA graph: captured once, then replayed with other numbers in the same memory.

How this differs from `torch.cuda.graph` around a solver, and why:
1. A solver's computations are told apart from what reads their outcome (`Recordable`). The graph holds the first, the host
   reads once after each replay, and the `Solution` is that of an ordinary call.
2. The operator is built inside the graph. Autograd runs a backward pass on the stream of its forward pass, so that a graph
   cannot take products of an operator that was built elsewhere; and what is built inside is built anew by each replay,
   from parameters and data as they are then.
3. What takes the host, such as a preconditioner, is made before, by a complete solve that also warms up the stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from .solution import LinearOperator, Solution, Solver
from .system import Recordable, System, check_vectors


def capture_solve(
    solver: Solver, build: Callable[[], LinearOperator], rhs: Tensor, x0: Tensor | None = None
) -> CapturedSolve:
    """Capture `solver(build(), rhs, x0)` for right-hand sides and starts like these, to be replayed by calling the result.

    On an NVIDIA GPU a replay is one launch of a CUDA graph and one transfer that tells how the solve ended, where the solver
    itself would launch dozens of kernels an iteration. Elsewhere, also on the CPU, a replay builds and solves as usual, so
    that a program can be the same everywhere.

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

    Whatever is to change must be written into the tensors that were there at capture (`copy_`); a tensor put in their place
    is not seen, nor is a number of Python's, such as a damping. The offsets of trajectories stay as they are.

    Args:
        solver: CG, PCG, NystromPCG, MINRES or Neumann. A preconditioner or a sketch is made before the capture and serves
            all replays; capture again once `iterations` has grown. MINRES goes on outside the graph where a system
            ends as inconsistent. All `max_iterations` are run, with the iterate frozen once the solve is over: choose
            them with that in mind.
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
            ValueError: a vector of another shape or dtype than at capture, or an x0 where there was none.
        """
        check_vectors("rhs", rhs, like=self._rhs)
        if x0 is not None:
            if self._x0 is None:
                raise ValueError("x0 came to a solve that was captured without one: pass an x0 to capture_solve too")
            check_vectors("x0", x0, like=self._rhs)
        self._rhs.copy_(rhs.detach())
        if self._x0 is not None:
            self._x0.copy_(torch.zeros_like(self._x0) if x0 is None else x0.detach())
        return self._replay()


def _capture(
    solver: Recordable, build: Callable[[], LinearOperator], rhs: Tensor, x0: Tensor | None
) -> Callable[[], Solution]:
    """The computations as a graph on rhs's device; what it returns launches the graph and reads the outcome."""
    with torch.cuda.device(rhs.device):
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # what the first one makes and keeps, the second one and the graph find
                system = System(build(), rhs, x0)
                launch = solver.prepare(system)
                launch(system)()
        torch.cuda.current_stream().wait_stream(stream)
        try:
            with torch.cuda.graph(graph, stream=stream):
                system = System(build(), rhs, x0)
                read = launch(system)
        except RuntimeError as error:
            raise RuntimeError(
                f"the solve cannot be captured in a CUDA graph: {error}. Neither `build` nor the operator that it makes may "
                "read the device (.item(), bool(…), boolean indexing) or use autograd graphs made outside of `build`"
            ) from error
        products = system.products

    def replay() -> Solution:
        graph.replay()
        system.products = products  # of one replay; reading may take some more
        solution = read()
        return dataclasses.replace(solution, residuals=solution.residuals.clone())

    return replay
