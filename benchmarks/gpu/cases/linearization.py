"""Products of the linearization: HVP, JVP, VJP and per-trajectory scores of a Gaussian tanh policy 24→h→h→6, float32.

The contestants are those of `benchmarks/test_linearization.py`. The floor is the products' arithmetic at the best rate of a
float32 product of the hidden shape, TF32 off.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.case import Bar, Case, Lab, Make, Run, Setup, by_backend, require
from benchmarks.harness import Peer, agrees_with, gemm_floor
from benchmarks.peers import gaussian_mlp as peers
from benchmarks.peers import gaussian_mlp_jax as jax_peers
from benchmarks.peers.gaussian_mlp import Problem, make_problem, pass_flops
from parl_core.hypergrad.linearize import linearize
from parl_core.ops import backend as backend_context

SIZES = {
    "hvp": ((64, 250), (64, 8000), (256, 250), (256, 1600), (256, 8000), (1024, 1600)),
    **{product: ((64, 1600), (256, 1600), (1024, 1600)) for product in ("jvp", "vjp", "scores")},
}
"""Width, steps."""
TINY = ((6, 20),)
RTOL = 3e-4  # of float32 sums over up to 8000 steps
ONE_THETA = "compiled for one θ"
COMPILED, GRAPHED, KEPT = "torch.compile", "torch.compile, one graph", "double backward, kept graph"
_BARS = {(64, 8000): 3.0, (256, 8000): 1.5}
_PRODUCTS = {"hvp": (2, 6), "jvp": (1, 2), "vjp": (1, 2), "scores": (2, 3)}
"""Matrix products for the first layer and for every other, given the forward pass; scores include it."""


def cases(tiny: bool) -> list[Case]:
    """HVPs first: they have the bars."""
    found = []
    for product in _PRODUCTS:
        for width, steps in TINY if tiny else SIZES[product]:
            barred = product == "hvp" and (width, steps) in _BARS
            found.append(
                Case(
                    topic="linearization",
                    name=f"{product} h{width}-B{steps}",
                    setup=partial(_setup, product, width, steps),
                    tests=("linearize",),
                    bars=_bars(_BARS[width, steps]) if barred else (),
                    op="linearize",
                    first=barred,
                )
            )
    return found


def _bars(at_least: float) -> tuple[Bar, ...]:
    """Of a call, against one that is launched at once as well; and without any launches."""
    return (
        Bar(at_least, peers=(COMPILED, GRAPHED, KEPT)),
        Bar(at_least, peers=(COMPILED, KEPT), on_device=True),
    )


def _setup(product: str, width: int, steps: int, lab: Lab) -> Setup:
    problem = make_problem(width, steps, 32 if product == "scores" and steps >= 32 else 10, lab.device)
    first, others = _PRODUCTS[product]
    return Setup(
        check=_right(problem, product),
        ours=by_backend(lambda backend: _ours(problem, product, backend)),
        peers=_peers(problem, product),
        floor=gemm_floor(
            pass_flops(steps, width, first, others), steps, width, device=lab.device, timer=lab.clock.a_call
        ),
        gradient=lambda: peers.gradient(problem),
        unrecorded=(GRAPHED,),
    )


def _right(problem: Problem, product: str) -> Callable[[Any], float]:
    """Lists of tensors or one flat tensor, against the float64 reference; each weight and bias by itself."""
    expected = peers.reference(problem)[product]
    sizes = [expected.shape[-1]] if product == "jvp" else [part.numel() for part in problem.params]
    check = agrees_with(expected.split(sizes, -1), RTOL)

    def error(answer: Any) -> float:
        if isinstance(answer, tuple | list):
            lead = expected.shape[:-1]
            parts = [part if isinstance(part, Tensor) else torch.from_dlpack(part) for part in answer]
            answer = torch.cat([part.reshape(*lead, -1) for part in parts], dim=-1)
        if not isinstance(answer, Tensor):
            answer = torch.from_dlpack(answer)
        return check(answer.reshape(expected.shape).split(sizes, -1))

    return error


def _ours(problem: Problem, product: str, backend: str) -> Run:
    v, w = problem.flat_tangent, problem.weights
    require("linearize", backend, v.device)
    with backend_context(backend):
        linear = linearize(problem.policy, problem.trajectories)
    products: dict[str, Run] = {
        "hvp": lambda: linear.hvp(w, v),
        "jvp": lambda: linear.jvp(v),
        "vjp": lambda: linear.vjp(w),
        "scores": lambda: linear.scores(w),
    }
    return products[product]


def _peers(problem: Problem, product: str) -> dict[str, Make | Peer]:
    found: dict[str, dict[str, Make | Peer]] = {
        "hvp": {
            KEPT: lambda: peers.double_backward_hvp(problem),
            COMPILED: lambda: peers.compiled_hvp(problem),
            GRAPHED: lambda: peers.compiled_hvp(problem, "reduce-overhead"),
            "torch.func": lambda: peers.func_hvp(problem),
            "JAX jit": lambda: jax_peers.hvp(problem),
            "JAX jit of linearize": lambda: jax_peers.prepared_hvp(problem),
        },
        "jvp": {
            KEPT: lambda: peers.double_backward_jvp(problem),
            "torch.func": lambda: peers.func_jvp(problem),
            "JAX jit": lambda: jax_peers.jvp(problem),
            "JAX jit of linearize": lambda: jax_peers.prepared_jvp(problem),
        },
        "vjp": {
            "backward, kept graph": lambda: peers.backward_vjp(problem),
            "JAX jit": lambda: jax_peers.vjp(problem),
            "JAX jit of vjp": lambda: jax_peers.prepared_vjp(problem),
        },
        "scores": {
            "torch.func": lambda: peers.func_scores(problem),
            COMPILED: lambda: peers.compiled_scores(problem),
            "JAX jit": lambda: jax_peers.scores(problem),
        },
    }
    if product == "hvp":
        found["hvp"]["torch.compile of linearize"] = Peer(lambda: peers.linearized_hvp(problem), ONE_THETA)
    return found[product]
