"""Peers in JAX for the linearization's benchmarks: the same function of the same numbers, compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .gaussian_mlp import ACT_DIM, OBS_DIM, Problem
from .jax_arrays import to_jax

Run = Callable[[], Any]


def _log_prob(params: Any, observations: Any, actions: Any) -> Any:
    import jax.numpy as jnp

    log_std, *layers = params
    hidden = observations
    for weight, bias in zip(layers[0:-2:2], layers[1:-2:2], strict=True):
        hidden = jnp.tanh(hidden @ weight.T + bias)
    mean = hidden @ layers[-2].T + layers[-1]
    standard = (actions - mean) * jnp.exp(-log_std)
    return -(0.5 * standard * standard + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def _weighted(params: Any, observations: Any, actions: Any, weights: Any) -> Any:
    return weights @ _log_prob(params, observations, actions)


def _data(problem: Problem) -> list[Any]:
    return to_jax([problem.trajectories.observations, problem.trajectories.actions, problem.weights])


def hvp(problem: Problem) -> Run:
    """jit of forward over reverse."""
    import jax

    @jax.jit
    def product(params: Any, tangent: Any, *data: Any) -> Any:
        return jax.jvp(lambda at: jax.grad(_weighted)(at, *data), (params,), (tangent,))[1]

    params, tangent, data = to_jax(problem.params), to_jax(problem.tangent), _data(problem)
    return lambda: product(params, tangent, *data)


def _prepared(make: Callable[[Any], Any], argument: Any, problem: Problem) -> Run:
    """What `make` computes at θ is handed to a compiled function as arrays.

    `make` is compiled as well, and is no part of what is timed. Neither is compiled again for another θ, which is tried.
    """
    import jax

    prepare, apply = jax.jit(make), jax.jit(lambda function, argument: function(argument))
    params = to_jax(problem.params)
    apply(prepare([2.0 * parameter for parameter in params]), argument)
    function = prepare(params)
    apply(function, argument)
    assert (prepare._cache_size(), apply._cache_size()) == (1, 1)
    return lambda: apply(function, argument)


def prepared_hvp(problem: Problem) -> Run:
    """jax.linearize of the gradient, whose residuals are arguments of the compiled function."""
    import jax

    data = _data(problem)

    def linear(params: Any) -> Any:
        return jax.linearize(lambda at: jax.grad(_weighted)(at, *data), params)[1]

    return _prepared(linear, to_jax(problem.tangent), problem)


def linearized_hvp(problem: Problem) -> Run:
    """jit of jax.linearize of the gradient: what was computed at θ is a constant of the compiled function."""
    import jax

    data = _data(problem)
    _, linear = jax.linearize(lambda params: jax.grad(_weighted)(params, *data), to_jax(problem.params))
    product, tangent = jax.jit(linear), to_jax(problem.tangent)
    return lambda: product(tangent)


def jvp(problem: Problem) -> Run:
    """jit of forward mode."""
    import jax

    @jax.jit
    def product(params: Any, tangent: Any, observations: Any, actions: Any) -> Any:
        return jax.jvp(lambda at: _log_prob(at, observations, actions), (params,), (tangent,))[1]

    params, tangent, data = to_jax(problem.params), to_jax(problem.tangent), _data(problem)[:2]
    return lambda: product(params, tangent, *data)


def prepared_jvp(problem: Problem) -> Run:
    """jax.linearize of the log-probabilities, whose residuals are arguments of the compiled function."""
    import jax

    observations, actions, _ = _data(problem)

    def linear(params: Any) -> Any:
        return jax.linearize(lambda at: _log_prob(at, observations, actions), params)[1]

    return _prepared(linear, to_jax(problem.tangent), problem)


def linearized_jvp(problem: Problem) -> Run:
    """jit of jax.linearize of the log-probabilities."""
    import jax

    observations, actions, _ = _data(problem)
    _, linear = jax.linearize(lambda params: _log_prob(params, observations, actions), to_jax(problem.params))
    product, tangent = jax.jit(linear), to_jax(problem.tangent)
    return lambda: product(tangent)


def vjp(problem: Problem) -> Run:
    """jit of the gradient."""
    import jax

    product = jax.jit(jax.grad(_weighted))
    params, data = to_jax(problem.params), _data(problem)
    return lambda: product(params, *data)


def prepared_vjp(problem: Problem) -> Run:
    """jax.vjp, whose forward pass is an argument of the compiled function."""
    import jax

    observations, actions, weights = _data(problem)

    def transpose(params: Any) -> Any:
        return jax.vjp(lambda at: _log_prob(at, observations, actions), params)[1]

    product = _prepared(transpose, weights, problem)
    return lambda: product()[0]


def linearized_vjp(problem: Problem) -> Run:
    """jit of the transpose of jax.vjp, whose forward pass is a constant of the compiled function."""
    import jax

    observations, actions, weights = _data(problem)
    _, transpose = jax.vjp(lambda params: _log_prob(params, observations, actions), to_jax(problem.params))
    product = jax.jit(lambda cotangent: transpose(cotangent)[0])
    return lambda: product(weights)


def scores(problem: Problem) -> Run:
    """jit of vmap of grad, over trajectories."""
    import jax

    number = problem.trajectories_of_one_length
    observations, actions, weights = _data(problem)
    data = (
        observations.reshape(number, -1, OBS_DIM),
        actions.reshape(number, -1, ACT_DIM),
        weights.reshape(number, -1),
    )
    product = jax.jit(jax.vmap(jax.grad(_weighted), in_axes=(None, 0, 0, 0)))
    params = to_jax(problem.params)
    return lambda: product(params, *data)
