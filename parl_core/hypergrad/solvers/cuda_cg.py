"""Conjugate gradients with CUDA kernels for all that lies between two products of any operator.

`launch` with `ConjugateGradients` is the specification, for one right-hand side: the same start, the same iterations, the
same end. There an iteration takes some forty kernels beside the product; here it takes one for short vectors and three for
others, the scalars stay in device memory, and a solve that is over skips its vectors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...offsets import is_capturing
from ...ops.accelerators import cuda_library
from .drive import CHECK_EVERY, PATIENCE, Iterate, conclude, first_residual
from .solution import Status
from .system import Outcome, System

LOOK_EVERY = 16  # iterations; the host then waits, for less than a product would take


def launch_on_cuda(system: System, *, rtol: float, max_iterations: int) -> Callable[[], Outcome]:
    """`launch` with `ConjugateGradients` for one right-hand side.

    It leaves early where the host may look whether the solve is over. While a CUDA graph is captured it may not, and all
    `max_iterations` become part of the graph.
    """
    x, residual = first_residual(system)
    library, stream = cuda_library().ConjugateGradients, _stream(x)
    direction, history = torch.empty_like(x), x.new_empty(max_iterations + 1)
    reals = x.new_empty(library.num_reals)
    words = torch.empty(library.num_words, dtype=torch.int32, device=x.device)
    partials = torch.empty(library.num_partials, dtype=torch.float64, device=x.device)
    solve = library(system.rhs, x, torch.empty_like(x), direction, history, reals, words, partials, 0.0, rtol, PATIENCE)
    # In the order of csrc/cuda/conjugate_gradients.h.
    norm, operator_norm, best = reals[:3]
    count, failures, negative, halted, active, unchecked = words[:6]
    look = not is_capturing()

    solve.start(residual, stream)
    taken = 0
    while taken < max_iterations:
        taken += 1
        solve.step(_product(system, direction), taken, stream)
        is_last = taken == max_iterations
        is_over = look and taken % LOOK_EVERY == 0 and not bool(active)
        if is_last or taken % CHECK_EVERY == 0 or (is_over and bool(unchecked)):
            solve.check(_product(system, x), taken, stream)
            is_over = look and not is_last and not bool(active)
        if is_over:
            break

    state = Iterate(x=x, norm=norm, negative=negative != 0, halted=halted != 0, operator_norm=operator_norm)
    return conclude(
        Status.BREAKDOWN,
        system,
        state,
        history=history[: taken + 1, None],
        count=count.long(),
        best=best,
        failures=failures,
        rtol=rtol,
    )


def _product(system: System, vector: Tensor) -> Tensor:
    return system.product(vector).to(vector.dtype).contiguous()


def _stream(like: Tensor) -> int:
    return torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
