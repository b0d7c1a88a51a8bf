"""A policy-alignment problem so small that all its trajectories can be summed over, without an error of sampling.

lower   θ*(ν) = argmax_θ V(ν, θ),  V = E_{τ∼ρ(θ)} Σ_h γ^h (r_ν(s_h, a_h) − temperature·log π_θ(a_h|s_h)) − damping/2·‖θ‖²
upper   L(ν) = E_{τ∼ρ(θ*(ν))} U_ν(τ),  U_ν = −Σ_h t(s_h, a_h) + cost·(Σ_h r_ν(s_h, a_h))²

The leader wants the true reward t and pays for the reward r_ν that it hands out. r_ν(s, a) = ν[s, a] is a table, π_θ the
tabular softmax policy `CategoricalPolicy(S, A)`: logits W[a, s] + b[a]. Everything here is a sum over trajectories in
float64 NumPy, each derivative written out: none of it comes from the library's engine, against which it can be held.

Notation: S states, A actions, H steps, N trajectories, P policy parameters, R = S·A reward parameters.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from ...envs.tabular import Array, enumerate_trajectories, random_mdp
from ...trajectories import Trajectories

NUM_STATES, NUM_ACTIONS, HORIZON = 3, 2, 3
DISCOUNT, TEMPERATURE, DAMPING = 0.9, 0.3, 0.05
COST = 0.05
"""What the leader pays for a squared return of 1 under its own reward."""

_GRADIENT_TOLERANCE = 1e-12
_MAX_NEWTON_STEPS = 200


class EnumeratedProblem:
    """A random MDP with random true reward t ~ N(0, 1); one seed, one problem.

    Attributes:
        states, actions: (N, H) of all trajectories.
        dynamics: (N,), the part of their probabilities that does not depend on the policy.
        true_reward: t, (R,), entry s·A + a.
        random_reward: some ν, (R,) ~ N(0, 1).
    """

    def __init__(self, seed: int) -> None:
        mdp = random_mdp(NUM_STATES, NUM_ACTIONS, DISCOUNT, seed)
        uniform = np.full((NUM_STATES, NUM_ACTIONS), 1.0 / NUM_ACTIONS)
        self._uniform = enumerate_trajectories(mdp, uniform, HORIZON)
        self.states = self._uniform.observations.argmax(-1).reshape(-1, HORIZON).numpy()
        self.actions = self._uniform.actions.reshape(-1, HORIZON).numpy()
        self.dynamics: Array = self._uniform.weights.numpy() * NUM_ACTIONS**HORIZON
        rng = np.random.default_rng((seed, 1))
        self.true_reward: Array = rng.normal(size=NUM_STATES * NUM_ACTIONS)
        self.random_reward: Array = rng.normal(size=NUM_STATES * NUM_ACTIONS)

        self._pairs = self.states * NUM_ACTIONS + self.actions  # (N, H), which entry of a table each step reads
        self._visits = np.eye(self.num_rewards)[self._pairs]  # (N, H, R)
        self._discounts = DISCOUNT ** np.arange(HORIZON)
        # (S, A, P), d logits[s, a] / dθ with θ = (W row by row, b), as the parameters of CategoricalPolicy come
        action, state = np.eye(NUM_ACTIONS)[None, :, :, None], np.eye(NUM_STATES)[:, None, None, :]
        weights = (action * state).reshape(NUM_STATES, NUM_ACTIONS, -1)
        biases = np.broadcast_to(np.eye(NUM_ACTIONS), (NUM_STATES, NUM_ACTIONS, NUM_ACTIONS))
        self._logit_jacobian = np.concatenate((weights, biases), axis=-1)

    @property
    def num_params(self) -> int:
        """P."""
        return self._logit_jacobian.shape[-1]

    @property
    def num_rewards(self) -> int:
        """R."""
        return NUM_STATES * NUM_ACTIONS

    @cached_property
    def counts(self) -> Array:
        """(N, R), how often each trajectory takes each action in each state."""
        return self._visits.sum(axis=1)

    def trajectories(self, theta: Array) -> Trajectories:
        """All of them with their probabilities at θ (P,), for the library."""
        return self._uniform.with_weights(torch.from_numpy(np.exp(self.log_probabilities(theta))))

    def log_policy(self, theta: Array) -> Array:
        """(S, A), log π_θ(a|s)."""
        logits = self._logit_jacobian @ theta
        shifted = logits - logits.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

    def log_probabilities(self, theta: Array) -> Array:
        """(N,), log ρ(τ; θ)."""
        return np.log(self.dynamics) + self.counts @ self.log_policy(theta).reshape(-1)

    def scores(self, theta: Array) -> Array:
        """(R, P), ∇_θ log π_θ(a|s) at entry s·A + a."""
        policy = np.exp(self.log_policy(theta))
        mean = np.einsum("sa,sap->sp", policy, self._logit_jacobian)
        return (self._logit_jacobian - mean[:, None]).reshape(-1, self.num_params)

    def felt_directions(self) -> Array:
        """(P, S(A−1)), an orthonormal basis of the parameters that change the policy.

        Adding a constant to the logits of a state changes nothing, and gradient ascent from θ = 0 never does so.
        """
        left, sizes, _ = np.linalg.svd(self.scores(np.zeros(self.num_params)).T)
        return left[:, : int(np.sum(sizes > 1e-9 * sizes[0]))]

    def contraction(self, theta: Array, reward: Array, step_size: float) -> float:
        """1 − step_size·μ: by how much a step of gradient ascent near θ = θ*(ν) shrinks the distance to it.

        μ is the smallest eigenvalue of −∇²V among the felt directions; step_size times the largest must be below 1.
        """
        basis = self.felt_directions()
        return 1.0 - step_size * float(np.linalg.eigvalsh(-basis.T @ self.value_hessian(theta, reward) @ basis)[0])

    def value(self, theta: Array, reward: Array) -> float:
        """V, for the reward ν (R,)."""
        gains = self._gains(self.log_policy(theta), reward)
        return float(np.exp(self.log_probabilities(theta)) @ gains.sum(axis=1)) - 0.5 * DAMPING * float(theta @ theta)

    def value_gradient(self, theta: Array, reward: Array) -> Array:
        """(P,), ∇_θ V."""
        return self._gains_to_come(theta, reward) @ self.scores(theta) - DAMPING * theta

    def value_hessian(self, theta: Array, reward: Array) -> Array:
        """(P, P), ∇²_θ V = E[Σ_h γ^h r̃_h (S_h S_hᵀ + Σ_{j≤h} ∇² log π_j)] − temperature·F − damping·I.

        r̃ = r − temperature·log π, S_h the sum of the scores up to step h, F = E[Σ_h γ^h s_h s_hᵀ].
        """
        log_policy = self.log_policy(theta)
        probabilities = np.exp(self.log_probabilities(theta))
        sums, scores = self._score_sums(theta), self.scores(theta)
        weights = (probabilities[:, None] * self._gains(log_policy, reward)).reshape(-1, 1)
        flat = sums.reshape(-1, self.num_params)
        # −∇² log π(a|s) is the Fisher matrix of π(·|s), Σ_a π(a|s) s sᵀ, whatever the action
        by_state = self._gains_to_come(theta, reward).reshape(NUM_STATES, -1).sum(axis=1)
        visited = np.bincount(
            self.states.reshape(-1), (probabilities[:, None] * self._discounts).reshape(-1), minlength=NUM_STATES
        )
        fisher = (np.exp(log_policy) * (by_state + TEMPERATURE * visited)[:, None]).reshape(-1, 1)
        return (weights * flat).T @ flat - (fisher * scores).T @ scores - DAMPING * np.eye(self.num_params)

    def cross_derivative(self, theta: Array) -> Array:
        """(P, R), ∇²_{θν} V; a table of rewards is linear in ν, so that ν does not enter."""
        weights = np.exp(self.log_probabilities(theta))[:, None] * self._discounts
        sums = (weights[..., None] * self._score_sums(theta)).reshape(-1, self.num_params)
        return sums.T @ self._visits.reshape(-1, self.num_rewards)

    def solve(self, reward: Array, start: Array) -> Array:
        """θ*(ν), (P,): Newton's method with backtracking from `start`, to ‖∇_θ V‖ ≤ 1e-12.

        Raises:
            ArithmeticError: it does not get there.
        """
        theta = start
        for _ in range(_MAX_NEWTON_STEPS):
            gradient = self.value_gradient(theta, reward)
            if np.linalg.norm(gradient) <= _GRADIENT_TOLERANCE:
                return theta
            eigenvalues, vectors = np.linalg.eigh(self.value_hessian(theta, reward))
            # uphill even where V is not concave
            step = vectors @ ((vectors.T @ gradient) / np.maximum(np.abs(eigenvalues), 1e-9))
            scale, value = 1.0, self.value(theta, reward)
            while self.value(theta + scale * step, reward) < value - 1e-14 and scale > 1e-6:
                scale *= 0.5
            theta = theta + scale * step
        raise ArithmeticError(f"the lower level did not converge: gradient {np.linalg.norm(gradient):.3g}")

    def losses(self, reward: Array) -> Array:
        """(N,), U_ν(τ)."""
        return -self.counts @ self.true_reward + COST * (self.counts @ reward) ** 2

    def objective(self, theta: Array, reward: Array) -> float:
        """E_{τ∼ρ(θ)} U_ν(τ); L(ν) at θ*(ν)."""
        return float(np.exp(self.log_probabilities(theta)) @ self.losses(reward))

    def direct_term(self, theta: Array, reward: Array) -> Array:
        """(R,), E[∇_ν U_ν]."""
        slopes = 2.0 * COST * np.exp(self.log_probabilities(theta)) * (self.counts @ reward)
        return slopes @ self.counts

    def hypergradient(self, theta: Array, reward: Array) -> Array:
        """(R,), E[∇_ν U] + Cᵀ(−H)⁻¹b with every factor taken at θ; ∇L(ν) at θ*(ν)."""
        losses = self.losses(reward)
        probabilities = np.exp(self.log_probabilities(theta))
        b = (probabilities * (losses - probabilities @ losses)) @ self._score_sums(theta)[:, -1]
        w = np.linalg.solve(-self.value_hessian(theta, reward), b)
        return self.direct_term(theta, reward) + self.cross_derivative(theta).T @ w

    def _gains(self, log_policy: Array, reward: Array) -> Array:
        """(N, H), γ^h (r − temperature·log π)."""
        table = reward - TEMPERATURE * log_policy.reshape(-1)
        return self._discounts * table[self._pairs]

    def _gains_to_come(self, theta: Array, reward: Array) -> Array:
        """(R,), expected sum over the steps that take this action in this state of what is gained from there on."""
        gains = self._gains(self.log_policy(theta), reward)
        to_come = np.exp(self.log_probabilities(theta))[:, None] * np.cumsum(gains[:, ::-1], axis=1)[:, ::-1]
        return to_come.reshape(-1) @ self._visits.reshape(-1, self.num_rewards)

    def _score_sums(self, theta: Array) -> Array:
        """(N, H, P), S_h."""
        return np.cumsum(self.scores(theta)[self._pairs], axis=1)
