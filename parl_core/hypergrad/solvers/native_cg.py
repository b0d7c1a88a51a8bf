"""Conjugate gradients in one call of the kernels, for an operator that they hold.

`drive` with `ConjugateGradients` is the specification: the same start, the same iterations, the same end. What it saves is
a dozen tensor operations in Python an iteration, which at small P take longer than the product.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from ...ops.registry import requested_backend
from .drive import CHECK_EVERY, PATIENCE, Iterate, ending, first_residual, is_rounding, read_ending
from .solution import LinearOperator, NativeOperator, Status
from .system import Outcome, System


def native_operator(operator: LinearOperator, rhs: Tensor) -> NativeOperator | None:
    """The operator as the kernels can solve with it for rhs; None where the loop in Python is to do it."""
    offered = getattr(operator, "native", None)
    if not callable(offered) or rhs.dim() != 1 or rhs.device.type != "cpu":
        return None
    if requested_backend() in ("reference", "cuda"):
        return None
    native: NativeOperator | None = offered(0.0)
    if native is None or (native.size, native.dtype) != (rhs.shape[0], rhs.dtype):
        return None
    return native


def launch_natively(
    native: NativeOperator, system: System, *, rtol: float, max_iterations: int
) -> Callable[[], Outcome]:
    """`launch` with `ConjugateGradients` for one right-hand side; it hears Ctrl-C between iterations."""
    x, residual = first_residual(system)
    norms, products, negative, halted, restarted, stagnated, operator_norm = importlib.import_module(
        "parl_core._native"
    ).conjugate_gradients(
        native.curvature,
        native.damping,
        system.rhs,
        residual,
        x,
        rtol,
        max_iterations,
        CHECK_EVERY,
        PATIENCE,
        torch.get_num_threads(),
    )
    system.products += products
    residuals = x.new_tensor(norms)
    state = Iterate(
        x=x,
        norm=residuals[-1],
        negative=torch.tensor(negative),
        halted=torch.tensor(halted),
        operator_norm=x.new_tensor(operator_norm),
    )
    rounding = is_rounding(state, rtol) & restarted & ~state.halted
    end = ending(
        system,
        state,
        converged=(state.norm <= rtol) | rounding,
        stagnated=torch.tensor(stagnated),
        count=torch.tensor(len(norms) - 1),
    )
    return lambda: read_ending(Status.BREAKDOWN, end, state, residuals[:, None])
