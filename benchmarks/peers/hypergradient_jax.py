"""The hypergradient in JAX: b, the solve and the cross term in one compiled function of θ, ν and the start."""

from __future__ import annotations

from typing import Any

from .gaussian_mlp_jax import _log_prob
from .hypergradient import DISCOUNT, HORIZON, PAIRS, RTOL, TEMPERATURE, Problem, Run
from .jax_arrays import to_jax


def _reward(params: Any, observations: Any, actions: Any) -> Any:
    import jax
    import jax.numpy as jnp

    hidden = jnp.concatenate((observations, actions), -1)
    for weight, bias in zip(params[0:-2:2], params[1:-2:2], strict=True):
        hidden = jax.nn.leaky_relu(hidden @ weight[0] + bias[0], 0.01)
    return jnp.tanh(hidden @ params[-2][0] + params[-1][0])[:, 0]


def _mean(layers: Any, observations: Any) -> Any:
    import jax.numpy as jnp

    hidden = observations
    for weight, bias in zip(layers[0:-2:2], layers[1:-2:2], strict=True):
        hidden = jnp.tanh(hidden @ weight.T + bias)
    return hidden @ layers[-2].T + layers[-1]


def one_jit(problem: Problem, steps: int = 1) -> Run:
    """Linearised once for each solve, jax.scipy's CG; warm started over several outer steps."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.scipy.sparse.linalg import cg

    number, damping = problem.lower.num_trajectories, problem.damping
    lower, first, second = (
        tuple(to_jax([part.observations, part.actions]))
        for part in (problem.lower, problem.upper.first, problem.upper.second)
    )
    (labels,) = to_jax([problem.upper.labels])

    @jax.jit
    def hypergradient(policy: Any, reward: Any, start: Any, lower: Any, first: Any, second: Any, labels: Any) -> Any:
        discounts = DISCOUNT ** jnp.arange(HORIZON)

        def losses_of(reward: Any) -> Any:
            one, other = (_reward(reward, *data).reshape(PAIRS, -1).sum(1) for data in (first, second))
            logit = other - one
            return jnp.logaddexp(0.0, logit) - labels * logit

        losses, pull = jax.vjp(losses_of, reward)
        direct = pull(jnp.full(PAIRS, 1 / PAIRS))[0]
        gains = jnp.repeat((losses - losses.mean()) / (PAIRS - 1), HORIZON)
        b = jax.grad(lambda at: sum(gains @ _log_prob(at, *data) for data in (first, second)))(policy)

        rewards = _reward(reward, *lower) - TEMPERATURE * _log_prob(policy, *lower)
        rewards = rewards.reshape(number, HORIZON)
        gains = (rewards - rewards.mean(0)) * discounts
        to_go = jnp.flip(jnp.flip(gains, 1).cumsum(1), 1).reshape(-1) / number
        _, hessian = jax.linearize(jax.grad(lambda at: -to_go @ _log_prob(at, *lower)), policy)
        _, mean = jax.linearize(lambda layers: _mean(layers, lower[0]), policy[1:])
        mean_transposed = jax.linear_transpose(mean, policy[1:])
        weights = (TEMPERATURE / number * jnp.tile(discounts, number))[:, None] * jnp.exp(-2 * policy[0])

        def product(v: Any) -> Any:
            fisher = mean_transposed(weights * mean(v[1:]))[0]
            spread = 2 * TEMPERATURE * discounts.sum() * v[0]
            return jax.tree.map(lambda h, f, x: h + f + damping * x, hessian(v), [spread, *fisher], v)

        w = cg(product, b, x0=start, tol=RTOL, maxiter=1000)[0]
        along = jax.jvp(lambda at: _log_prob(at, *lower), (policy,), (w,))[1]
        sums = along.reshape(number, HORIZON).cumsum(1)
        factors = (discounts * (sums - sums.mean(0)) / (number - 1)).reshape(-1)
        cross = jax.grad(lambda at: factors @ _reward(at, *lower))(reward)
        return w, jax.tree.map(jnp.add, direct, cross)

    points = [tuple(map(to_jax, problem.moved(step))) for step in range(steps)]
    zero = [jnp.zeros_like(p) for p in points[0][0]]

    def run() -> tuple[Any, ...]:
        w = zero
        for policy, reward in points:
            w, total = hypergradient(policy, reward, w, lower, first, second, labels)
        return tuple(np.concatenate([np.asarray(part).reshape(-1) for part in tree]) for tree in (w, total))

    return run
