"""Conjugate gradients with CUDA kernels for all that lies between two products of any operator.

`launch` with `ConjugateGradients` is the specification, for one right-hand side. There an iteration takes some forty
kernels beside the product; here it takes one for short vectors and three for others, the scalars stay in device memory, and
a solve that is over leaves its vectors alone.

It is told to be over by a look every `LOOK_EVERY` iterations or sooner, after the true residual: the one or two transfers
and the product that this costs are little beside the products of the iterations that may be saved.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...ops.accelerators import cuda_library, cuda_stream
from .drive import PATIENCE, Iterate, conclude, first_residual
from .repeat import repeat
from .solution import Status
from .system import Outcome, System

LOOK_EVERY = 16


def launch_on_cuda(system: System, *, rtol: float, max_iterations: int) -> Callable[[], Outcome]:
    """`launch` with `ConjugateGradients` for one right-hand side, its true residual taken after each turn of iterations.

    The turns are as many as it takes with `LOOK_EVERY` iterations each, and of one length. Unless a CUDA graph is captured,
    the host looks after each but the last whether the solve is over.
    """
    turns = -(-max_iterations // LOOK_EVERY)
    steps = -(-max_iterations // turns)
    x, residual = first_residual(system)
    library = cuda_library().ConjugateGradients
    direction, history = torch.empty_like(x), x.new_empty(max_iterations + 1)
    reals = x.new_empty(library.num_reals)
    words = torch.empty(library.num_words, dtype=torch.int32, device=x.device)
    partials = torch.empty(library.num_partials, dtype=torch.float64, device=x.device)
    solve = library(system.rhs, x, torch.empty_like(x), direction, history, reals, words, partials, rtol, PATIENCE)
    # In the order of csrc/cuda/conjugate_gradients.h.
    norm, operator_norm, best = reals[:3]
    count, failures, negative, halted, active = words[:5]

    def turn() -> None:
        for _ in range(steps):
            solve.step(_product(system, direction), cuda_stream(x))
        solve.check(_product(system, x), cuda_stream(x))

    solve.start(residual, cuda_stream(x))
    turn()  # outside of the loop, whose graph would make at each launch what an operator makes at its first product
    repeat(turn, at_most=turns - 1, going=active)
    state = Iterate(x=x, norm=norm, negative=negative != 0, halted=halted != 0, operator_norm=operator_norm)
    return conclude(
        Status.BREAKDOWN,
        system,
        state,
        history=history[:, None],
        count=count.long(),
        best=best,
        failures=failures,
        rtol=rtol,
    )


def _product(system: System, vector: Tensor) -> Tensor:
    return system.product(vector).to(vector.dtype).contiguous()
