"""Ways of getting a wrong answer without a word, each of them closed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import parl_core as parl
from tests.hypergrad.once import Squared

F64 = torch.float64


def problem(policy=None, reward=None, dtype=torch.float32):
    torch.manual_seed(0)
    policy = policy or parl.policies.GaussianPolicy(3, 2, (4,)).to(dtype)
    reward = reward or parl.rewards.RewardEnsemble(3, 2, (4,)).to(dtype)
    steps, offsets = 12, torch.tensor([0, 3, 7, 12])

    def data():
        return parl.Trajectories(torch.randn(steps, 3, dtype=dtype), torch.randn(steps, 2, dtype=dtype), offsets)

    pairs = parl.PreferencePairs(data(), data(), torch.tensor([0.0, 1.0, 1.0]))
    options = dict(loss=parl.PreferenceLoss(), discount=0.9, curvature=parl.Fisher(0.1, damping=0.1))
    return policy, reward, data(), pairs, options


def test_inference_mode_changes_nothing():
    policy, reward, lower, upper, options = problem()
    expected = parl.hypergradient(policy, reward, lower, upper, **options)
    with torch.inference_mode():
        result = parl.hypergradient(policy, reward, lower, upper, **options)
        linear = parl.linearize(policy, lower)
        product = linear.hvp(torch.ones(12), torch.ones(linear.num_params))
        implicit = parl.implicit_gradient(
            lambda up, low: (low["y"] ** 2).sum(),
            lambda up, low: ((low["y"] - up["x"]) ** 2).sum(),
            {"x": torch.ones(3)},
            {"y": torch.ones(3)},
        )
    assert expected.implicit.norm() > 0
    torch.testing.assert_close(result.total, expected.total)
    torch.testing.assert_close(product, linear.hvp(torch.ones(12), torch.ones(linear.num_params)))
    torch.testing.assert_close(implicit.total, torch.full((3,), 2.0))


def test_a_once_differentiable_lower_loss_is_refused():
    with pytest.raises(TypeError, match="lower_loss goes through a once-differentiable function"):
        parl.implicit_gradient(
            lambda up, low: (low["y"] ** 3).sum(),
            lambda up, low: (0.5 * Squared.apply(low["y"]) - up["x"] * low["y"]).sum(),
            {"x": torch.ones(3)},
            {"y": torch.ones(3)},
        )


def test_a_gradient_that_is_not_finite_warns():
    class Kinked(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(5))

        def forward(self, observations, actions):
            return ((torch.cat((observations, actions), -1) @ self.weight) ** 2).sqrt()

    policy, reward, lower, upper, options = problem(reward=Kinked())
    with pytest.warns(parl.HypergradientWarning, match="direct term holds a NaN"):
        result = parl.hypergradient(policy, reward, lower, upper, **options)
    assert result.direct.isnan().any()  # and stays one


def test_dense_does_not_cut_what_damping_makes_count():
    large, small = torch.linspace(1, 2, 20), torch.zeros(280)
    diagonal = torch.cat((large, small)) + 1e-4

    class Damped:
        damping = 1e-4

        def __call__(self, vector):
            return diagonal * vector

    rhs = torch.cat((torch.ones(20), torch.full((280,), 3e-5)))
    solution = parl.Dense()(Damped(), rhs)
    assert solution.status is parl.Status.CONVERGED
    torch.testing.assert_close(solution.value, rhs / diagonal, rtol=1e-4, atol=0)


@pytest.mark.parametrize("solver", [parl.CG(), parl.MINRES(), parl.Neumann(max_iterations=2000)], ids=str)
def test_a_hopeless_start_is_not_used(solver):
    diagonal = torch.linspace(1, 10, 10)
    solution = solver(lambda v: diagonal * v, torch.full((10,), 1e-20), torch.ones(10))
    assert solution.status is parl.Status.CONVERGED
    torch.testing.assert_close(solution.value, 1e-20 / diagonal, rtol=1e-4, atol=0)


def test_a_kept_sketch_does_not_keep_its_negative_curvature():
    solver = parl.NystromPCG(rank=5)
    indefinite, definite = torch.linspace(-1, 2, 10), torch.linspace(1, 2, 10)
    assert solver(lambda v: indefinite * v, torch.ones(10)).negative_curvature
    assert not solver(lambda v: definite * v, torch.ones(10)).negative_curvature


def test_a_policys_buffers_are_left_alone():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.policy = nn.BatchNorm1d(3), parl.policies.GaussianPolicy(3, 2, (4,))

        def log_prob(self, observations, actions):
            return self.policy.log_prob(self.norm(observations), actions)

    policy, reward, lower, upper, options = problem(policy=Normalised())
    before = {name: buffer.clone() for name, buffer in policy.named_buffers()}
    parl.hypergradient(policy, reward, lower, upper, **options)
    for name, buffer in policy.named_buffers():
        assert torch.equal(buffer, before[name])


def test_wrong_kinds_are_named():
    policy, reward, lower, upper, options = problem()
    with pytest.raises(TypeError, match="solver must be an instance"):
        parl.hypergradient(policy, reward, lower, upper, solver=parl.CG, **options)
    with pytest.raises(TypeError, match="curvature must be an instance"):
        parl.hypergradient(policy, reward, lower, upper, **{**options, "curvature": parl.Fisher})
    with pytest.raises(ValueError, match=r"policy and reward must have parameters of the same dtype"):
        parl.hypergradient(policy, reward.double(), lower, upper, **options)
    with pytest.raises(ValueError, match="max_iterations must be an integer"):
        parl.CG(max_iterations=10.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rtol must be a positive number"):
        parl.CG(rtol="1")  # type: ignore[arg-type]


def test_a_warm_start_reaches_the_solver():
    policy, reward, lower, upper, options = problem(dtype=F64)
    cold = parl.hypergradient(policy, reward, lower, upper, **options)
    warm = parl.hypergradient(policy, reward, lower, upper, x0=cold.solution.value, **options)
    assert cold.solution.iterations > 0
    assert warm.solution.iterations == 0
    torch.testing.assert_close(warm.total, cold.total)


@pytest.mark.parametrize("baseline", [True, False])
def test_the_right_hand_side_of_a_sample_by_its_definition(baseline):
    """b = (1/M) Σ (U_m − the mean of the other U) (S(τ0_m) + S(τ1_m)); without a baseline, U alone."""
    policy, reward, lower, upper, options = problem(dtype=F64)
    seen = []

    def solver(operator, rhs, x0=None):
        seen.append(rhs)
        return parl.CG()(operator, rhs, x0)

    parl.hypergradient(policy, reward, lower, upper, solver=solver, baseline=baseline, **options)
    values = parl.PreferenceLoss().per_sample(reward, upper).detach()
    if baseline:
        values = torch.stack([values[m] - values[[k for k in range(3) if k != m]].mean() for m in range(3)])
    scores = parl.linearize(policy, upper.first).scores() + parl.linearize(policy, upper.second).scores()
    torch.testing.assert_close(seen[0], values @ scores / 3)


def test_autocast_changes_nothing():
    policy, reward, lower, upper, options = problem()
    options["error_probes"] = 1
    expected = parl.hypergradient(policy, reward, lower, upper, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = parl.hypergradient(policy, reward, lower, upper, **options)
    torch.testing.assert_close(result.total, expected.total, rtol=0, atol=0)
    torch.testing.assert_close(result.stderr, expected.stderr, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_are_refused(dtype):
    policy, reward, lower, upper, options = problem()
    with pytest.raises(TypeError, match=r"too few digits for second derivatives: policy.float\(\)"):
        parl.hypergradient(policy.to(dtype), reward, lower.to(dtype), upper, **options)


def test_the_warning_points_at_the_caller():
    policy, reward, lower, upper, options = problem()
    options["solver"] = parl.CG(rtol=1e-12, max_iterations=1)
    with pytest.warns(parl.HypergradientWarning, match="MAX_ITERATIONS") as caught:
        parl.hypergradient(policy, reward, lower, upper, **options)
    assert caught[0].filename == __file__


def test_hooks_on_the_reward_wait_for_backward():
    policy, reward, lower, upper, options = problem()
    expected = parl.hypergradient(policy, reward, lower, upper, **options)
    for parameter in reward.parameters():
        parameter.register_hook(lambda gradient: 0.1 * gradient)
    result = parl.hypergradient(
        policy, reward, lower, upper, regularizer=lambda r: next(r.parameters()).sum(), **options
    )
    for name in ("direct", "implicit"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name), rtol=0, atol=0)
    assert result.regularizer.sum() == next(reward.parameters()).numel()
    result.backward()
    found = torch.cat([p.grad.reshape(-1) for p in reward.parameters()])
    torch.testing.assert_close(found, 0.1 * result.total)


def test_a_parameter_of_both_levels_is_refused():
    policy, reward, lower, upper, options = problem()
    reward.shared = policy.network[0]
    with pytest.raises(ValueError, match=r"policy's 'network.0.weight' and reward's 'shared.weight' are the same"):
        parl.hypergradient(policy, reward, lower, upper, **options)
    for parameter in reward.shared.parameters():
        parameter.requires_grad_(False)
    parl.hypergradient(policy, reward, lower, upper, **options)


@pytest.mark.parametrize("role", ["policy", "reward"])
def test_modules_made_in_inference_mode_are_named(role):
    with torch.inference_mode():
        made, *_ = problem()[role == "reward" :]
    policy, reward, lower, upper, options = problem(**{role: made})
    with pytest.raises(ValueError, match=rf"{role} \(\w+\): '[\w.]+' was made in inference mode"):
        parl.hypergradient(policy, reward, lower, upper, **options)
    fresh = problem()[role == "reward"]
    fresh.load_state_dict(made.state_dict())  # the way out that the message names
    policy, reward, lower, upper, options = problem(**{role: fresh})
    assert parl.hypergradient(policy, reward, lower, upper, **options).total.isfinite().all()


def test_a_frozen_parameter_made_in_inference_mode_is_named():
    policy, _, lower, *_ = problem()
    with torch.inference_mode():
        policy.network[0].bias = nn.Parameter(torch.zeros(4), requires_grad=False)
    with pytest.raises(ValueError, match=r"'network\.0\.bias' was made in inference mode"):
        parl.linearize(policy, lower)


def test_dropout_in_the_reward_is_refused():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 1))

        def forward(self, observations, actions):
            return self.network(torch.cat((observations, actions), dim=1)).squeeze(1)

    policy, reward, lower, upper, options = problem(reward=Dropped())
    with pytest.raises(
        ValueError, match=r"reward\(observations, actions\) must give the same numbers.*reward.eval\(\)"
    ):
        parl.hypergradient(policy, reward, lower, upper, **options)
    assert parl.hypergradient(policy, reward.eval(), lower, upper, **options).total.isfinite().all()


class Listed(nn.Module):
    """A linear map whose parameters are held by a list as well, and used from there."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.held = [self.linear.weight, self.linear.bias]

    def forward(self, observations, actions):
        return (nn.functional.linear(observations, *self.held) * actions).sum(1)

    def log_prob(self, observations, actions):
        mean = nn.functional.linear(observations, *self.held)
        return torch.distributions.Normal(mean, 1.0).log_prob(actions).sum(1)


def test_parameters_held_by_another_name_are_not_missed():
    torch.manual_seed(0)
    held = Listed()
    policy, reward, lower, upper, options = problem(reward=held)
    result = parl.hypergradient(
        policy, reward, lower, upper, regularizer=lambda r: sum(p.square().sum() for p in held.held), **options
    )
    held.forward = lambda o, a: (held.linear(o) * a).sum(1)
    expected = parl.hypergradient(
        policy, reward, lower, upper, regularizer=lambda r: sum(p.square().sum() for p in r.parameters()), **options
    )
    for name in ("direct", "implicit", "regularizer"):
        assert getattr(expected, name).norm() > 0
        torch.testing.assert_close(getattr(result, name), getattr(expected, name))
    with pytest.raises(ValueError, match=r"reaches its parameter 'linear.weight' by another reference"):
        parl.linearize(Listed(), lower)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_reward_is_the_reward(backend):
    class Cumulative(nn.Module):
        """Sums over the trajectory so far, if it is told where trajectories begin."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 1)

        def forward(self, observations, actions, offsets=None):
            values = self.linear(observations).squeeze(1)
            starts = torch.zeros_like(values) if offsets is None else 0.1 * offsets[:-1].sum()
            return values + starts * values.square()

    policy, reward, lower, upper, options = problem(reward=Cumulative())
    expected = parl.hypergradient(policy, reward, lower, upper, **options)
    result = parl.hypergradient(policy, torch.compile(reward, backend=backend), lower, upper, **options)
    torch.testing.assert_close(result.total, expected.total)


def test_levels_of_different_dtypes_are_refused_and_frozen_parts_may_be_of_any():
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Linear(3, 4).bfloat16().requires_grad_(False)
            self.head = nn.Linear(4, 1)

        def forward(self, observations, actions):
            return self.head(self.frozen(observations.bfloat16()).float()).squeeze(1)

    policy, reward, lower, upper, options = problem(reward=Backbone())
    assert parl.hypergradient(policy, reward, lower, upper, **options).total.isfinite().all()
    with pytest.raises(ValueError, match=r"same dtype, got torch\.float32 and torch\.float64"):
        parl.hypergradient(policy, reward.double(), lower, upper, **options)


def test_a_rewards_buffers_are_left_alone():
    reward = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = reward

        def forward(self, observations, actions):
            return self.network(torch.cat((observations, actions), 1)).squeeze(1)

    policy, module, lower, upper, options = problem(reward=Normed())
    before = {name: b.clone() for name, b in module.named_buffers()}
    parl.hypergradient(policy, module, lower, upper, **options)
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(buffer, before[name], rtol=0, atol=0)


def test_error_probes_with_a_solver_and_a_curvature_of_ones_own():
    policy, reward, lower, upper, options = problem()
    options["solver"] = lambda operator, rhs, x0: parl.CG()(operator, rhs, x0)
    assert parl.hypergradient(policy, reward, lower, upper, error_probes=2, **options).stderr.isfinite().all()

    class Own:
        def operator(self, linearization, rewards, discount):
            return lambda v: v

    options["curvature"] = Own()
    assert parl.hypergradient(policy, reward, lower, upper, **options).total.isfinite().all()
    with pytest.raises(TypeError, match="which Own's does not"):
        parl.hypergradient(policy, reward, lower, upper, error_probes=2, **options)
