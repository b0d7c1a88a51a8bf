"""Every product of the linearization against dense derivatives by torch.func."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.utils.flop_counter import FlopCounterMode

import parl_core as parl
from parl_core.hypergrad.chunk_graphs import is_unchanged
from parl_core.models.policies import CategoricalPolicy, GaussianPolicy
from tests.hypergrad.once import Squared

F64 = torch.float64


@pytest.fixture(autouse=True, params=["kernels where there are any", "autograd"])
def backend(request):
    """Both ways to compute the products of the package's own policies."""
    with parl.backend("reference") if request.param == "autograd" else contextlib.nullcontext():
        yield


class LogProbOnly(nn.Module):
    """A policy that offers log_prob and nothing else."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def log_prob(self, observations, actions):
        return self.policy.log_prob(observations, actions)


def gaussian(**options):
    return GaussianPolicy(3, 2, hidden=(4,), **options).to(F64)


POLICIES = {
    "state": lambda: gaussian(),
    "global": lambda: gaussian(log_std="global", activation="silu"),
    "fixed": lambda: gaussian(log_std=-0.5),
    "squashed": lambda: gaussian(squash=True),
    "categorical": lambda: CategoricalPolicy(3, 4, hidden=(5,)).to(F64),
    "softmax": lambda: CategoricalPolicy(3, 4).to(F64),
    "log_prob only": lambda: LogProbOnly(gaussian()),
}


def example(name: str, lengths=(3, 0, 1, 5)):
    torch.manual_seed(0)
    policy = POLICIES[name]()
    total = sum(lengths)
    observations = torch.randn(total, 3, dtype=F64)
    if name in ("categorical", "softmax"):
        actions = torch.randint(4, (total, 1))
    else:
        actions = torch.rand(total, 2, dtype=F64) * 1.8 - 0.9
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    return policy, parl.Trajectories(observations, actions, offsets)


def dense(policy, trajectories):
    """log_prob as a function of the flat parameters, and the parameters."""
    names = [n for n, _ in policy.named_parameters()]
    shapes = [p.shape for p in policy.parameters()]

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.policy = policy

        def forward(self):
            return self.policy.log_prob(trajectories.observations, trajectories.actions)

    def log_prob(theta):
        pieces = theta.split([s.numel() for s in shapes])
        params = {f"policy.{n}": p.view(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        return functional_call(Call(), params, ())

    return log_prob, nn.utils.parameters_to_vector(policy.parameters()).detach()


@pytest.mark.parametrize("name", POLICIES)
def test_products_match_dense_derivatives(name):
    policy, trajectories = example(name)
    log_prob, theta = dense(policy, trajectories)
    jacobian = jacrev(log_prob)(theta)
    linear = parl.linearize(policy, trajectories)
    assert linear.num_params == theta.numel()
    w, v = torch.randn(trajectories.num_steps, dtype=F64), torch.randn(theta.numel(), dtype=F64)
    torch.testing.assert_close(linear.log_prob, log_prob(theta))
    torch.testing.assert_close(linear.jvp(v), jacobian @ v)
    torch.testing.assert_close(linear.vjp(w), jacobian.T @ w)
    second = hessian(lambda t: log_prob(t) @ w)(theta)
    torch.testing.assert_close(linear.hvp(w, v), second @ v)
    w2 = torch.randn_like(w)  # another weight after the first graph is cached
    torch.testing.assert_close(linear.hvp(w2, v), hessian(lambda t: log_prob(t) @ w2)(theta) @ v)
    both = linear.jvp_and_hvp(w, v)
    torch.testing.assert_close(both[0], jacobian @ v)
    torch.testing.assert_close(both[1], second @ v)
    scores = torch.stack([rows.sum(0) for rows in jacobian.split(trajectories.lengths.tolist())])
    torch.testing.assert_close(linear.scores(), scores)


def test_fisher_is_exact_over_actions_for_a_categorical_policy():
    policy, trajectories = example("categorical")
    linear = parl.linearize(policy, trajectories)
    w, v = torch.rand(trajectories.num_steps, dtype=F64), torch.randn(linear.num_params, dtype=F64)
    expected = torch.zeros_like(v)
    probs = policy.logits(trajectories.observations).softmax(-1).detach()
    for action in range(4):
        forced = parl.Trajectories(
            trajectories.observations, torch.full((trajectories.num_steps,), action), trajectories.offsets
        )
        jacobian = jacrev(dense(policy, forced)[0])(dense(policy, forced)[1])
        expected += jacobian.T @ (w * probs[:, action] * (jacobian @ v))
    torch.testing.assert_close(linear.fisher_vp(w, v), expected)


@pytest.mark.parametrize("name", ["state", "global", "fixed", "squashed"])
def test_fisher_of_a_gaussian_is_minus_the_expected_hessian(name):
    """Gauss–Hermite quadrature over actions; the Fisher matrix is −E[∇² log π], and squashing does not change it."""
    import numpy as np

    policy, trajectories = example(name, lengths=(2,))
    linear = parl.linearize(policy, trajectories)
    nodes, weights = np.polynomial.hermite_e.hermegauss(6)
    mean, log_std = (t.detach() for t in policy.mean_and_log_std(trajectories.observations))
    w, v = torch.rand(2, dtype=F64), torch.randn(linear.num_params, dtype=F64)
    expected = torch.zeros_like(v)
    for x, wx in zip(nodes, weights, strict=True):
        for y, wy in zip(nodes, weights, strict=True):
            actions = mean + log_std.exp() * torch.tensor([x, y], dtype=F64)
            actions = torch.tanh(actions) if policy.squash else actions
            there = parl.linearize(policy, parl.Trajectories(trajectories.observations, actions, trajectories.offsets))
            expected -= there.hvp(w, v) * float(wx * wy) / (2 * np.pi)
    torch.testing.assert_close(linear.fisher_vp(w, v), expected, rtol=1e-7, atol=1e-9)


def test_sampled_fisher_uses_the_actions_taken():
    policy, trajectories = example("log_prob only")
    linear = parl.linearize(policy, trajectories)
    jacobian = jacrev(dense(policy, trajectories)[0])(dense(policy, trajectories)[1])
    w, v = torch.rand(trajectories.num_steps, dtype=F64), torch.randn(linear.num_params, dtype=F64)
    torch.testing.assert_close(linear.fisher_vp(w, v), jacobian.T @ (w * (jacobian @ v)))


def test_log_prob_is_always_the_policys_own():
    class Tempered(CategoricalPolicy):
        """Overrides log_prob with a parameter of its own, and keeps the parent's analytic Fisher."""

        def __init__(self):
            super().__init__(3, 4)
            self.tau = nn.Parameter(torch.tensor(1.5, dtype=F64))

        def logits(self, observations):
            return super().logits(observations) * self.tau

        def log_prob(self, observations, actions):
            return 2 * super().log_prob(observations, actions)

    torch.manual_seed(0)
    policy = Tempered().to(F64)
    _, trajectories = example("softmax")
    linear = parl.linearize(policy, trajectories)
    torch.testing.assert_close(
        linear.log_prob, policy.log_prob(trajectories.observations, trajectories.actions).detach()
    )
    ones = torch.ones(trajectories.num_steps, dtype=F64)
    torch.testing.assert_close(linear.scores().sum(0), linear.vjp(ones))
    log_prob, theta = dense(policy, trajectories)
    torch.testing.assert_close(linear.vjp(ones), jacrev(log_prob)(theta).sum(0))


def test_fisher_uses_parameters_inside_params_fisher():
    class Scaled(CategoricalPolicy):
        def __init__(self):
            super().__init__(3, 4)
            self.log_scale = nn.Parameter(torch.zeros((), dtype=F64))

        def params_fisher(self, params, tangent):
            return super().params_fisher(params, tangent) * self.log_scale.exp()

    policy = Scaled().to(F64)
    _, trajectories = example("softmax")
    linear = parl.linearize(policy, trajectories)
    w, v = torch.rand(trajectories.num_steps, dtype=F64), torch.randn(linear.num_params, dtype=F64)
    before = linear.fisher_vp(w, v)
    policy.log_scale.data.fill_(3.0)  # a later change does not reach the linearization
    torch.testing.assert_close(linear.fisher_vp(w, v), before)
    assert not before.requires_grad


def test_frozen_parameters_are_left_out_and_shared_ones_count_once():
    policy, trajectories = example("state")
    policy.network[0].weight.requires_grad_(False)
    frozen = policy.network[0].weight.numel()
    total = sum(p.numel() for p in policy.parameters())
    assert parl.linearize(policy, trajectories).num_params == total - frozen
    policy.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        parl.linearize(policy, trajectories)


def test_no_steps_give_zeros():
    policy, trajectories = example("state", lengths=(0, 0))
    linear = parl.linearize(policy, trajectories)
    v = torch.ones(linear.num_params, dtype=F64)
    assert linear.jvp(v).shape == (0,)
    assert not linear.vjp(torch.zeros(0, dtype=F64)).any()
    assert not linear.hvp(torch.zeros(0, dtype=F64), v).any()
    assert not linear.fisher_vp(torch.zeros(0, dtype=F64), v).any()
    assert linear.scores().shape == (2, linear.num_params)


def test_later_changes_of_the_policy_do_not_reach_the_linearization():
    policy, trajectories = example("state")
    linear = parl.linearize(policy, trajectories)
    before = linear.vjp(torch.ones(trajectories.num_steps, dtype=F64))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(2.0)
    torch.testing.assert_close(linear.vjp(torch.ones(trajectories.num_steps, dtype=F64)), before)


def test_a_once_differentiable_function_is_refused_not_dropped():
    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = gaussian()

        def log_prob(self, observations, actions):
            return -Squared.apply(self.inner.log_prob(observations, actions))

    _, trajectories = example("state")
    linear = parl.linearize(Policy(), trajectories)
    v = torch.ones(linear.num_params, dtype=F64)
    assert linear.vjp(torch.ones(trajectories.num_steps, dtype=F64)).norm() > 0  # first order is fine
    for product in (lambda: linear.jvp(v), lambda: linear.hvp(torch.ones(trajectories.num_steps, dtype=F64), v)):
        with pytest.raises(TypeError, match="once-differentiable"):
            product()


@pytest.mark.parametrize("chunk_steps", [None, 17])
@pytest.mark.parametrize("wrap", [lambda policy: policy, LogProbOnly], ids=["analytic Fisher", "log_prob only"])
def test_costs_are_the_flops_of_wide_networks(chunk_steps, wrap):
    torch.manual_seed(0)
    policy = wrap(GaussianPolicy(24, 6, hidden=(256, 256, 256)))
    trajectories = parl.Trajectories(torch.randn(64, 24), torch.randn(64, 6), torch.tensor([0, 20, 20, 64]))

    def flops(call):
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    def gradient():
        total = policy.log_prob(trajectories.observations, trajectories.actions).sum()
        torch.autograd.grad(total, list(policy.parameters()))

    with parl.backend("reference"):  # torch counts the flops of its own operations only
        linear = parl.linearize(policy, trajectories, chunk_steps=chunk_steps)
    w, v = torch.randn(64), torch.randn(linear.num_params)
    calls = {
        "vjp": lambda: linear.vjp(w),
        "jvp": lambda: linear.jvp(v),
        "jvp_and_hvp": lambda: linear.jvp_and_hvp(w, v),
        "fisher_vp": lambda: linear.fisher_vp(w, v),
        "scores": lambda: linear.scores(),
    }
    assert linear.costs._fields == tuple(calls)
    for name, call in calls.items():
        call()  # so that graphs that are kept are there
        assert flops(call) / flops(gradient) == pytest.approx(getattr(linear.costs, name), rel=0.1), name


def test_scores_take_step_weights():
    policy, trajectories = example("state")
    jacobian = jacrev(dense(policy, trajectories)[0])(dense(policy, trajectories)[1])
    w = torch.randn(trajectories.num_steps, dtype=F64)
    rows = (w[:, None] * jacobian).split(trajectories.lengths.tolist())
    expected = torch.stack([piece.sum(0) for piece in rows])
    for chunk_steps in (None, 1, 2, 100):
        torch.testing.assert_close(parl.linearize(policy, trajectories, chunk_steps=chunk_steps).scores(w), expected)


def test_errors_name_the_argument():
    policy, trajectories = example("state")
    linear = parl.linearize(policy, trajectories)
    with pytest.raises(ValueError, match=r"v must have shape \(P,\)"):
        linear.jvp(torch.zeros(3, dtype=F64))
    with pytest.raises(ValueError, match=r"w must have shape \(T,\)"):
        linear.vjp(torch.zeros(3, dtype=F64))
    with pytest.raises(ValueError, match="float32"):
        parl.linearize(policy.float(), trajectories)
    policy.double().network[2].bias.data.fill_(float("nan"))
    with pytest.raises(parl.NonFiniteError, match="log_prob"):
        parl.linearize(policy, trajectories)


class TwoHeads(nn.Module):
    """Two categorical actions a step; the heads' logits as (T, 2, 3), or side by side as (T, 6)."""

    def __init__(self, side_by_side):
        super().__init__()
        self.network, self.side_by_side = nn.Linear(3, 6), side_by_side

    def distribution_params(self, observations):
        logits = self.network(observations)
        return logits if self.side_by_side else logits.reshape(-1, 2, 3)

    def params_fisher(self, params, tangent):
        shape = params.shape
        probs, tangent = params.reshape(-1, 2, 3).softmax(-1), tangent.reshape(-1, 2, 3)
        return (probs * tangent - probs * (probs * tangent).sum(-1, keepdim=True)).reshape(shape)

    def log_prob(self, observations, actions):
        logits = self.network(observations).reshape(-1, 2, 3).log_softmax(-1)
        return logits.gather(-1, actions[..., None]).squeeze(-1).sum(-1)


def test_heads_that_would_broadcast_are_refused():
    torch.manual_seed(0)
    trajectories = parl.Trajectories(torch.randn(2, 3, dtype=F64), torch.randint(3, (2, 2)), torch.tensor([0, 2]))
    w, v = torch.rand(2, dtype=F64), torch.randn(24, dtype=F64)
    policy = TwoHeads(side_by_side=False).to(F64)
    with pytest.raises(ValueError, match=r"distribution_params must return shape \(T, k\) = \(2, k\), got \(2, 2, 3\)"):
        parl.linearize(policy, trajectories).fisher_vp(w, v)
    policy.side_by_side = True
    log_probs = policy.network(trajectories.observations).reshape(2, 2, 3).log_softmax(-1)
    expected = torch.zeros_like(v)
    for t, head, action in itertools.product(range(2), range(2), range(3)):
        pieces = torch.autograd.grad(log_probs[t, head, action], list(policy.parameters()), retain_graph=True)
        score = torch.cat([piece.reshape(-1) for piece in pieces])
        expected += w[t] * log_probs[t, head, action].exp().detach() * (score @ v) * score
    torch.testing.assert_close(parl.linearize(policy, trajectories).fisher_vp(w, v), expected)


@pytest.mark.parametrize(
    "bad", [lambda x: x.sum(-1, keepdim=True), lambda x: x.sum(-1), lambda x: x[:1], lambda x: 1.0]
)
def test_a_params_fisher_of_another_shape_is_refused(bad):
    class Wrong(CategoricalPolicy):
        def params_fisher(self, params, tangent):
            return bad(super().params_fisher(params, tangent))

    _, trajectories = example("softmax")
    linear = parl.linearize(Wrong(3, 4).to(F64), trajectories)
    with pytest.raises(ValueError, match=r"params_fisher must return shape \(T, k\) = \(9, 4\)"):
        linear.fisher_vp(torch.ones(9, dtype=F64), torch.ones(linear.num_params, dtype=F64))


def written_to_data(w):
    w.data.mul_(2)
    return w


def written_to_numpy(w):
    w.numpy()[:] *= 2
    return w


@pytest.mark.parametrize(
    "change",
    [lambda w: w.mul_(2), written_to_data, written_to_numpy, lambda w: w[::2], lambda w: w.as_strided((9,), (2,))],
    ids=["in place", "data", "numpy", "every second", "strided"],
)
def test_the_kept_graph_follows_the_weights(change):
    """Whatever way the same memory comes to mean other weights, Hessian products are those of a fresh linearization."""
    policy, trajectories = example("state")
    linear = parl.linearize(policy, trajectories)
    v = torch.randn(linear.num_params, dtype=F64)
    memory = torch.randn(18, dtype=F64)
    linear.hvp(memory[:9], v)
    changed = change(memory)[:9]
    torch.testing.assert_close(linear.hvp(changed, v), parl.linearize(policy, trajectories).hvp(changed, v))


def test_unchanged_weights_are_told_by_memory_and_version():
    memory = torch.randn(18)
    w = memory[:9]
    version = w._version
    assert is_unchanged(w, version, w)
    assert is_unchanged(w, version, memory[:9])
    assert not is_unchanged(w, version, memory[9:])  # elsewhere
    assert not is_unchanged(w, version, memory[:8])
    assert not is_unchanged(w, version, memory[::2])  # the same place and shape
    assert not is_unchanged(w, version, w.clone())
    with torch.inference_mode():
        assert not is_unchanged(w, version, torch.randn(9))
    memory.mul_(2)
    assert not is_unchanged(w, version, w)


@pytest.mark.parametrize(
    "terms", [t for n in range(4) for t in itertools.combinations(("hessian", "fisher", "scores"), n)]
)
def test_second_order_is_the_sum_of_its_terms(terms):
    policy, trajectories = example("state")
    log_prob, theta = dense(policy, trajectories)
    linear = parl.linearize(policy, trajectories)
    weights = {term: torch.randn(trajectories.num_steps, dtype=F64) for term in terms}
    v, expected = torch.randn_like(theta), torch.zeros_like(theta)
    if "hessian" in terms:
        expected += hessian(lambda t: log_prob(t) @ weights["hessian"])(theta) @ v
    if "fisher" in terms:
        expected += linear.fisher_vp(weights["fisher"], v)
    if "scores" in terms:
        rows = jacrev(log_prob)(theta).split(trajectories.lengths.tolist())
        sums = torch.cat([piece.cumsum(0) for piece in rows])
        expected += sums.T @ (weights["scores"] * (sums @ v))
    for chunk_steps in (None, 2):
        linear = parl.linearize(policy, trajectories, chunk_steps=chunk_steps)
        torch.testing.assert_close(linear.second_order(v, **weights), expected)
    with pytest.raises(ValueError, match=r"fisher must have shape \(T,\) = \(9,\)"):
        linear.second_order(v, fisher=torch.zeros(3, dtype=F64))
