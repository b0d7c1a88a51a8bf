"""Every solver × curvature × policy against a dense float64 solve, and ragged data of any shape.

The oracle shares nothing with the engine: −H is the second derivative of a surrogate that is the lower objective
reweighted to nearby parameters, or that defines the ablation at hand; C and b are derivatives of first ones.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.functional import hessian, jacobian

import parl_core as parl
from parl_core import policies
from tests.hypergrad.sequences import F64, as_function, sequence_policy
from tests.hypergrad.sequences import data as sequence_data

DISCOUNT = 0.9
TEMPERATURE = 0.2
RAGGED = (3, 0, 1, 4, 2)


class Reward(nn.Module):
    """A small network of its own; observations and actions of any kind."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(width, 3), nn.Tanh(), nn.Linear(3, 1)).to(F64)

    def forward(self, observations, actions):
        inputs = torch.cat((observations.to(F64), actions.reshape(len(observations), -1).to(F64)), dim=1)
        return self.network(inputs).squeeze(-1)


def gaussian(**options):
    return policies.GaussianPolicy(2, 2, hidden=(3,), **options).to(F64)


STEPWISE = {
    "gaussian": gaussian,
    "gaussian, global std": lambda: gaussian(log_std="global"),
    "gaussian, fixed std": lambda: gaussian(log_std=-0.5, activation="silu"),
    "squashed gaussian": lambda: gaussian(squash=True),
    "categorical": lambda: policies.CategoricalPolicy(2, 3, hidden=(3,)).to(F64),
}
POLICIES = [*STEPWISE, "gru", "transformer", "tokens"]


def make(name: str, lengths, weights=None, seed: int = 0):
    """A policy and trajectories of these lengths for it."""
    if name not in STEPWISE:
        return sequence_policy(name), sequence_data(name, lengths, seed=seed, weights=weights)
    torch.manual_seed(0)
    policy = STEPWISE[name]()
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    observations = torch.randn(total, 2, generator=generator, dtype=F64)
    with torch.no_grad():
        actions = policy.sample(observations, generator)[0]
    offsets = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])
    return policy, parl.Trajectories(observations, actions, offsets, weights=weights)


class Dense:
    """The three factors as matrices, for a policy, a reward and trajectories."""

    def __init__(self, policy, reward, trajectories) -> None:
        self.trajectories = trajectories
        self.log_prob, self.theta = as_function(policy, trajectories)
        self.reward, self.nu = as_function(reward, trajectories, "forward")
        self.policy = policy
        self.weights = trajectories.weights.to(F64)[trajectories.trajectory_index]
        self.powers = DISCOUNT ** trajectories.time.to(F64)
        steps = torch.arange(trajectories.num_steps)
        index = trajectories.trajectory_index
        self.up_to = ((index[:, None] == index) & (steps[:, None] >= steps)).to(F64)  # (T, T) j ≤ h of one trajectory

    def sums(self, theta):
        """(T,) log-probabilities up to each step."""
        return self.up_to @ self.log_prob(theta)

    def cross(self, responses):
        """(R,) ∇_ν Σ w γ^h r_h responses_h."""
        return jacobian(lambda nu: (self.weights * self.powers * responses) @ self.reward(nu), self.nu)

    def scores(self):
        """(T, P) of the single steps."""
        return jacobian(self.log_prob, self.theta)

    def full(self, baseline, temperature):
        """−H of ScoreHessian: of the value reweighted to nearby parameters."""
        gains = self.reward(self.nu) - temperature * self.log_prob(self.theta)
        here = self.sums(self.theta)
        taken = self.baseline(baseline, gains)

        def value(theta):
            sums = self.sums(theta)
            ratios = (sums - here).exp()
            return ((self.weights * (self.powers * gains)) * ratios).sum() - (self.weights * taken * ratios).sum()

        return -hessian(value, self.theta) + temperature * self.fisher(None)

    def printed(self, baseline, temperature):
        """−H of LogProbHessian."""
        gains = self.reward(self.nu) - temperature * self.log_prob(self.theta)
        steps = self.weights * (self.powers * gains - self.baseline(baseline, gains))
        return -hessian(lambda theta: steps @ self.sums(theta), self.theta) + temperature * self.fisher(None)

    def baseline(self, baseline, gains):
        """(T,) the discounted baseline of each step, a trajectory's last step taking those of the times after it too."""
        if baseline is None:
            return torch.zeros_like(gains)
        time, index = self.trajectories.time.tolist(), self.trajectories.trajectory_index.tolist()
        lengths = self.trajectories.lengths.tolist()
        horizon = max(lengths)
        mean = [
            sum(float(self.weights[t] * gains[t]) for t in range(len(time)) if time[t] == h)
            / float(self.trajectories.weights.sum())
            for h in range(horizon)
        ]
        taken = [
            sum(DISCOUNT**k * mean[k] for k in range(h, horizon if h == lengths[i] - 1 else h + 1))
            for h, i in zip(time, index, strict=True)
        ]
        return torch.tensor(taken, dtype=F64)

    def fisher(self, scores):
        if scores == "trajectories":
            rows = torch.zeros(self.trajectories.num_trajectories, self.theta.numel(), dtype=F64)
            rows.index_add_(0, self.trajectories.trajectory_index, self.powers.sqrt()[:, None] * self.scores())
            return rows.T @ (self.trajectories.weights.to(F64)[:, None] * rows)
        steps = self.weights * self.powers
        if scores == "steps" or not hasattr(self.policy, "distribution_params"):
            return self.scores().T @ (steps[:, None] * self.scores())
        head, _ = as_function(self.policy, self.trajectories, "distribution_params")

        def divergence(theta):
            """KL from the policy here to the one at theta, whose second derivative at theta is the Fisher matrix."""
            before, after = head(self.theta), head(theta)
            if isinstance(self.policy, policies.GaussianPolicy):
                pairs = [(m, s.exp()) for m, s in (p.chunk(2, -1) for p in (before, after))]
                first, second = (torch.distributions.Normal(m, s) for m, s in pairs)
                return steps @ torch.distributions.kl_divergence(first, second).sum(-1)
            first, second = (torch.distributions.Categorical(logits=p) for p in (before, after))
            return steps @ torch.distributions.kl_divergence(first, second)

        return hessian(divergence, self.theta)


CURVATURES = {
    "Fisher": (parl.Fisher(TEMPERATURE), lambda d: TEMPERATURE * d.fisher(None)),
    "Fisher, steps": (parl.Fisher(TEMPERATURE, scores="steps"), lambda d: TEMPERATURE * d.fisher("steps")),
    "Fisher, trajectories": (
        parl.Fisher(TEMPERATURE, scores="trajectories"),
        lambda d: TEMPERATURE * d.fisher("trajectories"),
    ),
    "ScoreHessian": (parl.ScoreHessian(), lambda d: d.full(None, 0.0)),
    "ScoreHessian, mean, entropy": (
        parl.ScoreHessian("mean", temperature=TEMPERATURE),
        lambda d: d.full("mean", TEMPERATURE),
    ),
    "LogProbHessian": (parl.LogProbHessian(), lambda d: d.printed(None, 0.0)),
    "LogProbHessian, mean, entropy": (
        parl.LogProbHessian("mean", temperature=TEMPERATURE),
        lambda d: d.printed("mean", TEMPERATURE),
    ),
}
SOLVERS = {
    "CG": parl.CG(rtol=1e-11, max_iterations=500),
    "PCG": parl.PCG(rtol=1e-11, max_iterations=500),
    "MINRES": parl.MINRES(rtol=1e-11, max_iterations=500),
    "Neumann": parl.Neumann(rtol=1e-11, max_iterations=2000),
    "NystromPCG": parl.NystromPCG(rank=5, rtol=1e-11, max_iterations=500),
    "Woodbury": parl.Woodbury(rtol=1e-11),
    "Dense": parl.Dense(),
}


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("name", POLICIES)
def test_every_solver_with_every_curvature_and_policy(name, curvature, monkeypatch):
    monkeypatch.setattr("parl_core.hypergrad.curvature._WORTH", float("inf"))  # PCG's preconditioner, however small P
    spec, dense_curvature = CURVATURES[curvature]
    policy, lower = make(name, RAGGED)
    _, upper = make(name, (2, 3, 1, 0), seed=5)
    reward = Reward(lower.observations.shape[1] + lower.actions.reshape(lower.num_steps, -1).shape[1])
    values = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=F64)

    dense, data = Dense(policy, reward, lower), Dense(policy, reward, upper)
    matrix = dense_curvature(dense)
    lowest = float(torch.linalg.eigvalsh(matrix)[0])
    damping = 0.3 * float(torch.linalg.matrix_norm(matrix, 2)) + max(0.0, -lowest)  # definite, and well conditioned
    centred = (values - values.mean()) * 4 / 3 / 4
    b = data.scores().T @ centred[upper.trajectory_index]
    w = torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=F64), b)
    responses = dense.up_to @ (dense.scores() @ w)
    options = dict(
        loss=parl.TrajectoryLoss(lambda r, t: values + 0.0 * next(r.parameters()).sum()),
        discount=DISCOUNT,
        curvature=type(spec)(**{**vars(spec), "damping": damping}),
    )
    for solver_name, solver in SOLVERS.items():
        if solver_name == "Woodbury" and curvature != "Fisher, trajectories":
            with pytest.raises(TypeError, match=r"outer_products|trajectories"):
                parl.hypergradient(policy, reward, lower, upper, solver=solver, **options)
            continue
        if isinstance(solver, parl.NystromPCG | parl.PCG):
            solver.reset()
        result = parl.hypergradient(policy, reward, lower, upper, solver=solver, **options)
        assert result.solution.status is parl.Status.CONVERGED, solver_name
        assert not result.solution.negative_curvature
        torch.testing.assert_close(result.solution.value, w, rtol=1e-6, atol=1e-8 * float(w.abs().max()))
        centring = responses - mean_of_others(responses, lower)
        torch.testing.assert_close(result.implicit, dense.cross(centring), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("cross", "passes"), [(False, 1), (True, 2)], ids=["shared", "apart"])
def test_one_pass_of_the_reward_serves_curvature_and_cross_term(cross, passes):
    policy, lower = make("gaussian", (40, 60))  # longer than what is looked at for randomness
    _, other = make("gaussian", (40, 60), seed=3)
    _, upper = make("gaussian", (2, 3), seed=5)
    reward = Reward(4)
    seen = []
    reward.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    parl.hypergradient(
        policy,
        reward,
        lower,
        upper,
        loss=parl.TrajectoryLoss(lambda r, t: t.sum_steps(r(t.observations, t.actions))),
        discount=DISCOUNT,
        curvature=parl.Fisher(1.0, damping=1.0),
        cross=other if cross else None,
    )
    assert seen.count(100) == passes


def mean_of_others(values, trajectories):
    """By loops: at each step the mean over the other trajectories of their value then, or of their last one."""
    pieces = values.split(trajectories.lengths.tolist())

    def at(piece, h):
        return float(piece[min(h, len(piece) - 1)]) if len(piece) else 0.0

    found = [
        sum(at(other, h) for j, other in enumerate(pieces) if j != i) / (len(pieces) - 1)
        for i, piece in enumerate(pieces)
        for h in range(len(piece))
    ]
    return torch.tensor(found, dtype=F64)


@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any),
    data=st.data(),
    curvature=st.sampled_from(sorted(CURVATURES)),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_ragged_weighted_data_of_any_shape(lengths, data, curvature):
    """Empty and one-step trajectories among them, weights of either sign or none: the operator is the dense matrix."""
    weights = data.draw(st.none() | st.lists(st.floats(-1, 2, width=32), min_size=len(lengths), max_size=len(lengths)))
    if weights is not None and "mean" in curvature and abs(sum(weights)) < 0.1:
        weights = None  # a mean over weights that cancel
    tensor = None if weights is None else torch.tensor(weights, dtype=F64)
    policy, trajectories = make("categorical", lengths, weights=tensor)
    reward = Reward(3)
    spec, dense_curvature = CURVATURES[curvature]
    linearization = parl.linearize(policy, trajectories)
    rewards = reward(trajectories.observations, trajectories.actions).detach()
    operator = spec.operator(linearization, rewards, DISCOUNT)
    columns = torch.stack([operator(v) for v in torch.eye(linearization.num_params, dtype=F64)])
    expected = dense_curvature(Dense(policy, reward, trajectories))
    torch.testing.assert_close(columns, expected, rtol=1e-7, atol=1e-9)
