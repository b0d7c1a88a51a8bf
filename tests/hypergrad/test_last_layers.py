"""The approximate inverse from a policy's last two layers: where it is exact, and that it is a preconditioner elsewhere."""

from __future__ import annotations

import itertools

import pytest
import torch

import parl_core as parl
from parl_core.hypergrad.captured import CapturedPolicy
from parl_core.hypergrad.last_layers import last_layers_preconditioner
from parl_core.models.policies import CategoricalPolicy, GaussianPolicy
from tests.hypergrad.systems import F64

HEADS = {
    "state": lambda hidden, activation: GaussianPolicy(3, 2, hidden, activation),
    "global": lambda hidden, activation: GaussianPolicy(3, 2, hidden, activation, log_std="global"),
    "fixed": lambda hidden, activation: GaussianPolicy(3, 2, hidden, activation, log_std=-0.3),
    "squashed": lambda hidden, activation: GaussianPolicy(3, 2, hidden, activation, squash=True),
    "categorical": lambda hidden, activation: CategoricalPolicy(3, 4, hidden, activation),
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def steps_of(policy, number, lengths=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    observations = torch.randn(number, policy.obs_dim, generator=generator, dtype=F64)
    with torch.no_grad():
        actions = policy.sample(observations, generator)[0]
    lengths = torch.tensor([number] if lengths is None else lengths)
    return parl.Trajectories(observations, actions, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]))


def problem(policy, number=40, damping=60.0, seed=0):
    """The policy in float64, its steps, and weights of either sign."""
    policy = policy.double()
    if getattr(policy, "log_std_kind", None) == "global":
        torch.nn.init.normal_(policy.log_std, std=0.3)
    trajectories = steps_of(policy, number, seed=seed)
    hessian, fisher = 0.03 * torch.randn(number, dtype=F64), 0.03 * torch.rand(number, dtype=F64)
    return policy, trajectories, {"hessian": hessian, "fisher": fisher, "damping": damping}


def preconditioner(policy, trajectories, **weights):
    captured = CapturedPolicy(policy)
    return last_layers_preconditioner(captured, trajectories.observations, trajectories.actions, **weights)


def dense(policy, trajectories, *, hessian, fisher, damping):
    linearization = parl.linearize(policy, trajectories)
    eye = torch.eye(linearization.num_params, dtype=F64)
    return torch.stack([linearization.second_order(e, hessian=hessian, fisher=fisher) for e in eye]) + damping * eye


def dense_inverse(found, size):
    return found.apply(torch.eye(size, dtype=F64))


@pytest.mark.parametrize(
    ("head", "activation", "depth"), list(itertools.product(HEADS, ["tanh", "relu", "silu"], [1, 2]))
)
def test_it_is_the_inverse_where_the_basis_is_complete(head, activation, depth):
    """Two hidden units, fewer than outputs: the basis holds all parameters of the last two layers."""
    policy, trajectories, weights = problem(HEADS[head]((4, 2)[2 - depth :], activation))
    a = dense(policy, trajectories, **weights)
    assert float(torch.linalg.eigvalsh(a)[0]) > 0
    inverse = dense_inverse(preconditioner(policy, trajectories, **weights), len(a))
    first = sum(p.numel() for name, p in policy.named_parameters() if depth == 2 and name.startswith("network.0."))
    skipped = policy.log_std.numel() if head == "global" else 0
    last = torch.ones(len(a), dtype=torch.bool)
    last[skipped : skipped + first] = False
    expected = torch.zeros_like(a)
    expected[last.outer(last)] = torch.linalg.inv(a[last][:, last]).flatten()
    expected[~last, ~last] = 1.0 / weights["damping"]
    torch.testing.assert_close(inverse, expected, rtol=1e-9, atol=1e-10)


@pytest.fixture
def whatever_it_costs(monkeypatch):
    """On networks small enough for a test the inverse is not worth its price."""
    monkeypatch.setattr("parl_core.hypergrad.curvature._WORTH", float("inf"))


def noisy_system(damping):
    """The Hessian of a small sample, whose smallest eigenvalue is about 1 with a damping of 36, and b."""
    torch.manual_seed(0)  # at every call the same
    policy = GaussianPolicy(8, 3, (48, 48), log_std="global").double()
    linearization = parl.linearize(policy, steps_of(policy, 400, [25] * 16))
    curvature = parl.LogProbHessian(baseline="mean", temperature=0.3, damping=damping)
    operator = curvature.operator(linearization, torch.randn(400, dtype=F64), 0.99)
    return operator, linearization.vjp(torch.randn(16, dtype=F64).repeat_interleave(25) / 16)


@pytest.mark.usefixtures("whatever_it_costs")
def test_it_saves_a_third_of_the_iterations():
    operator, rhs = noisy_system(36.0)
    plain, found = parl.CG(rtol=1e-6)(operator, rhs), parl.PCG(rtol=1e-6)(operator, rhs)
    assert plain.status is found.status is parl.Status.CONVERGED
    assert not plain.negative_curvature
    assert not found.negative_curvature
    torch.testing.assert_close(found.value, plain.value, rtol=1e-4, atol=1e-5 * float(plain.value.abs().max()))
    assert found.iterations <= plain.iterations * 2 / 3
    assert found.cost == pytest.approx(found.products * operator.cost + operator.preconditioner().cost)


@pytest.mark.usefixtures("whatever_it_costs")
@pytest.mark.parametrize("damping", [36.0, 20.0, 1.0], ids=["definite", "indefinite", "far from it"])
def test_it_is_symmetric_and_positive_definite_even_where_the_operator_is_not(damping):
    operator, rhs = noisy_system(damping)
    apply = operator.preconditioner().apply
    vectors = torch.randn(40, len(rhs), dtype=F64)
    images = apply(vectors)
    products = images @ vectors.T
    torch.testing.assert_close(products, products.T)
    assert bool((products.diagonal() > 0).all())
    torch.testing.assert_close(images[3], apply(vectors[3]))


@pytest.mark.parametrize("damping", [1.0, 0.01])
def test_it_stays_definite_where_the_restricted_operator_is_not(damping):
    """Along the operator's own most negative directions too, which random vectors miss."""
    policy, trajectories, weights = problem(GaussianPolicy(3, 2, (2,)), damping=damping)
    a = dense(policy, trajectories, **weights)
    assert float(torch.linalg.eigvalsh(a)[0]) < 0
    inverse = dense_inverse(preconditioner(policy, trajectories, **weights), len(a))
    torch.testing.assert_close(inverse, inverse.T)
    assert float(torch.linalg.eigvalsh(inverse)[0]) > 0


@pytest.mark.usefixtures("whatever_it_costs")
def test_negative_curvature_is_told_behind_it_too():
    operator, rhs = noisy_system(20.0)
    assert parl.PCG(max_iterations=50)(operator, rhs).negative_curvature


@pytest.mark.usefixtures("whatever_it_costs")
def test_a_block_and_a_start():
    operator, rhs = noisy_system(36.0)
    rows = torch.stack((rhs, torch.randn_like(rhs)))
    together = parl.PCG(rtol=1e-8)(operator, rows)
    assert together.status is parl.Status.CONVERGED
    for row, value in zip(rows, together.value, strict=True):
        torch.testing.assert_close(operator(value), row, rtol=0, atol=1e-8 * float(row.norm()))
    again = parl.PCG(rtol=1e-6)(operator, rhs, together.value[0])
    assert (again.iterations, again.products) == (0, 1)


@pytest.mark.usefixtures("whatever_it_costs")
def test_an_added_damping_is_part_of_it():
    without, rhs = noisy_system(0.0)
    assert without.preconditioner() is None
    held, _ = noisy_system(36.0)
    expected = held.preconditioner().apply(rhs)
    torch.testing.assert_close(parl.Damped(without, 36.0).preconditioner().apply(rhs), expected)
    torch.testing.assert_close(parl.Damped(parl.Damped(without, 30.0), 6.0).preconditioner().apply(rhs), expected)


@pytest.mark.usefixtures("whatever_it_costs")
def test_a_changed_policy_is_solved_behind_the_kept_one():
    solver = parl.PCG(rtol=1e-6)
    first, rhs = noisy_system(36.0)
    solver(first, rhs)
    moved, _ = noisy_system(37.0)
    kept = solver(moved, rhs)
    assert kept.status is parl.Status.CONVERGED
    assert kept.cost == pytest.approx(kept.products * moved.cost)  # nothing was made
    fresh = parl.PCG(rtol=1e-6)(moved, rhs)
    assert fresh.cost > fresh.products * moved.cost
    assert kept.iterations <= fresh.iterations + 2
    torch.testing.assert_close(kept.value, fresh.value, rtol=1e-3, atol=1e-4 * float(fresh.value.abs().max()))


def test_it_is_not_made_where_it_costs_more_than_it_saves():
    operator, rhs = noisy_system(36.0)
    assert operator.preconditioner() is None
    plain, found = parl.CG()(operator, rhs), parl.PCG()(operator, rhs)
    assert torch.equal(found.value, plain.value)
    assert (found.products, found.cost) == (plain.products, plain.cost)


class Own(GaussianPolicy):
    """Not exactly one of the package's."""


@pytest.mark.parametrize(
    "policy",
    [Own(3, 2, (4,)), CategoricalPolicy(3, 4), GaussianPolicy(3, 2, (4,)).requires_grad_(False)],
    ids=["subclass", "no hidden layer", "frozen in part"],
)
def test_policies_without_it(policy):
    policy.network[0].requires_grad_()
    policy, trajectories, weights = problem(policy)
    assert preconditioner(policy, trajectories, **weights) is None


@pytest.mark.parametrize("changed", [{"damping": 0.0}, {"max_cost": 0.01}], ids=["no damping", "too dear"])
def test_none_of_it(changed):
    policy, trajectories, weights = problem(GaussianPolicy(3, 2, (4,)))
    assert preconditioner(policy, trajectories, **{**weights, **changed}) is None


@pytest.mark.usefixtures("whatever_it_costs")
def test_a_score_term_has_none():
    policy, trajectories, _ = problem(GaussianPolicy(3, 2, (4,)))
    linearization = parl.linearize(policy, trajectories)
    for curvature in (parl.ScoreHessian(damping=1.0), parl.Fisher(1.0, damping=1.0, scores="trajectories")):
        operator = curvature.operator(linearization, torch.ones(40, dtype=F64), 0.9)
        assert getattr(operator, "preconditioner", lambda: None)() is None


def test_terms_left_out_are_zero():
    policy, trajectories, weights = problem(GaussianPolicy(3, 2, (4,)))
    size = sum(p.numel() for p in policy.parameters())
    for name in ("hessian", "fisher"):
        without = preconditioner(policy, trajectories, **{**weights, name: None})
        zero = preconditioner(policy, trajectories, **{**weights, name: torch.zeros_like(weights[name])})
        torch.testing.assert_close(dense_inverse(without, size), dense_inverse(zero, size))


@pytest.mark.usefixtures("whatever_it_costs")
def test_float32_finds_the_same():
    policy, trajectories, weights = problem(GaussianPolicy(8, 3, (20, 20)))
    vector = torch.randn(sum(p.numel() for p in policy.parameters()), dtype=F64)
    expected = preconditioner(policy, trajectories, **weights).apply(vector)
    weights = {name: w.float() if isinstance(w, torch.Tensor) else w for name, w in weights.items()}
    found = preconditioner(policy.float(), trajectories.to(torch.float32), **weights).apply(vector.float())
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_later_changes_of_a_fixed_log_std_are_not_felt():
    policy, trajectories, weights = problem(HEADS["fixed"]((4,), "tanh"))
    captured = CapturedPolicy(policy)
    expected = preconditioner(policy, trajectories, **weights)
    policy.log_std += 1.0
    found = last_layers_preconditioner(captured, trajectories.observations, trajectories.actions, **weights)
    size = sum(p.numel() for p in captured.params)
    assert torch.equal(dense_inverse(found, size), dense_inverse(expected, size))
