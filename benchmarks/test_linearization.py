"""Products with the derivatives of log π: a Gaussian tanh policy 24→h→h→6 on B steps, float32.

Every floor is the fewest flops in matrix products at the best rate measured for the hidden shape. Given the forward
pass, an HVP needs two products for the first layer and six for every other; a JVP or a VJP one and two. Scores include
the forward pass: two and three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import parl_core as parl
from benchmarks.harness import Peer, against, gemm_floor
from benchmarks.peers import gaussian_mlp as peers
from benchmarks.peers import gaussian_mlp_jax as jax_peers
from benchmarks.peers.gaussian_mlp import Problem, make_problem, pass_flops
from parl_core.ops import backend

SIZES = [(64, 250), (64, 1600), (64, 8000), (256, 250), (256, 1600), (256, 8000), (1024, 1600)]
PRODUCT = pytest.mark.parametrize("width, steps", SIZES, ids=[f"h{width}-B{steps}" for width, steps in SIZES])
ONE_THETA = "compiled for one θ"
RTOL = 3e-4  # of float32 sums over up to 8000 steps


def right(problem: Problem, product: str) -> Callable[[Any], float]:
    """Lists of tensors or one flat tensor, against the float64 reference; each weight and bias by itself."""
    expected = peers.reference(problem)[product]
    check = against(expected, RTOL, blocks=None if product == "jvp" else [part.numel() for part in problem.params])

    def flattened(answer: Any) -> float:
        if isinstance(answer, tuple | list):
            lead = expected.shape[:-1]
            answer = np.concatenate([np.asarray(part).reshape(*lead, -1) for part in answer], axis=-1)
        return check(answer)

    return flattened


def ours(problem: Problem, product: Callable[[parl.Linearization], Any]) -> dict[str, Any]:
    """The best backend, and the torch graphs that specify it."""

    def graphs() -> Callable[[], Any]:
        with backend("reference"):
            linear = parl.linearize(problem.policy, problem.trajectories)
        return lambda: product(linear)

    def best() -> Callable[[], Any]:
        linear = parl.linearize(problem.policy, problem.trajectories)
        return lambda: product(linear)

    return {"parl-core": best, "parl-core, torch graphs": graphs}


@PRODUCT
def test_hvp(contest, width, steps):
    problem = make_problem(width, steps, num_trajectories=10)
    v = problem.flat_tangent
    contest(
        right(problem, "hvp"),
        ours=ours(problem, lambda linear: linear.hvp(problem.weights, v)),
        peers={
            "double backward, kept graph": lambda: peers.double_backward_hvp(problem),
            "torch.func": lambda: peers.func_hvp(problem),
            "torch.compile": lambda: peers.compiled_hvp(problem),
            "torch.compile of linearize": Peer(lambda: peers.linearized_hvp(problem), ONE_THETA),
            "JAX jit": lambda: jax_peers.hvp(problem),
            "JAX jit of linearize": lambda: jax_peers.prepared_hvp(problem),
            "JAX jit of linearize, constants": Peer(lambda: jax_peers.linearized_hvp(problem), ONE_THETA),
            "curvlinops": lambda: peers.curvlinops_hvp(problem),
        },
        floor=gemm_floor(pass_flops(steps, width, 2, 6), steps, width),
        gradient=lambda: peers.gradient(problem),
    )


@PRODUCT
def test_jvp(contest, width, steps):
    problem = make_problem(width, steps, num_trajectories=10)
    v = problem.flat_tangent
    contest(
        right(problem, "jvp"),
        ours=ours(problem, lambda linear: linear.jvp(v)),
        peers={
            "double backward, kept graph": lambda: peers.double_backward_jvp(problem),
            "torch.func": lambda: peers.func_jvp(problem),
            "JAX jit": lambda: jax_peers.jvp(problem),
            "JAX jit of linearize": lambda: jax_peers.prepared_jvp(problem),
            "JAX jit of linearize, constants": Peer(lambda: jax_peers.linearized_jvp(problem), ONE_THETA),
        },
        floor=gemm_floor(pass_flops(steps, width, 1, 2), steps, width),
        gradient=lambda: peers.gradient(problem),
    )


@PRODUCT
def test_vjp(contest, width, steps):
    problem = make_problem(width, steps, num_trajectories=10)
    contest(
        right(problem, "vjp"),
        ours=ours(problem, lambda linear: linear.vjp(problem.weights)),
        peers={
            "backward, kept graph": lambda: peers.backward_vjp(problem),
            "JAX jit": lambda: jax_peers.vjp(problem),
            "JAX jit of vjp": lambda: jax_peers.prepared_vjp(problem),
            "JAX jit of vjp, constants": Peer(lambda: jax_peers.linearized_vjp(problem), ONE_THETA),
        },
        floor=gemm_floor(pass_flops(steps, width, 1, 2), steps, width),
        gradient=lambda: peers.gradient(problem),
    )


@pytest.mark.parametrize("width", [64, 256, 1024], ids=lambda width: f"h{width}")
def test_scores(contest, width):
    """32 trajectories of 50 steps. Everyone starts from the parameters, but where the forward pass is said to be at hand."""
    steps = 1600
    problem = make_problem(width, steps, num_trajectories=32)

    def scores(linear: parl.Linearization) -> Any:
        return linear.scores(problem.weights)

    def from_parameters() -> Callable[[], Any]:
        return lambda: scores(parl.linearize(problem.policy, problem.trajectories))

    at_hand = ours(problem, scores)
    contest(
        right(problem, "scores"),
        ours={
            "parl-core": from_parameters,
            **{f"{name}, linearized before": make for name, make in at_hand.items()},
        },
        peers={
            "backward for each trajectory": lambda: peers.backward_scores(problem),
            "torch.func": lambda: peers.func_scores(problem),
            "torch.compile": lambda: peers.compiled_scores(problem),
            "JAX jit": lambda: jax_peers.scores(problem),
        },
        floor=gemm_floor(pass_flops(steps, width, 2, 3), steps, width),
        gradient=lambda: peers.gradient(problem),
    )
