"""Which policies are given to the kernels, and which are left to autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import parl_core as parl
from parl_core.hypergrad.native_linearize import NativeChunk
from parl_core.models.policies import GaussianPolicy
from parl_core.ops import BackendError
from tests.hypergrad.native_policies import F64, HEADS, close, make_policy, make_steps

native = pytest.importorskip("parl_core._native")


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def hooked(policy):
    policy.network[0].register_forward_hook(lambda module, args, output: 2 * output)
    return policy


def own_method(policy):
    policy.distribution_params = lambda observations: 2 * GaussianPolicy.distribution_params(policy, observations)
    return policy


def frozen(policy):
    policy.network[0].weight.requires_grad_(False)
    return policy


def parametrized(policy):
    nn.utils.parametrizations.weight_norm(policy.network[0])
    return policy


def replaced(policy):
    policy.network[1] = nn.ELU()
    return policy


def tied(policy):
    policy.network[4].weight = policy.network[2].weight
    return policy


def without_bias(policy):
    policy.network[0] = nn.Linear(3, 4, bias=False, dtype=F64)
    return policy


def one_log_std(policy):
    policy.log_std = nn.Parameter(torch.full((1,), 0.3, dtype=F64))
    return policy


def one_fixed_log_std(policy):
    del policy.log_std
    policy.log_std_kind = -0.3
    policy.register_buffer("log_std", torch.full((1,), -0.3, dtype=F64))
    return policy


def log_std_of_ones_own(policy):
    del policy.log_std
    policy.log_std_kind = -0.3
    policy.log_std = torch.full((4,), -0.3, dtype=F64)
    return policy


def without_units(policy):
    return GaussianPolicy(3, 4, (0,), log_std="global").to(F64)


def subclassed(policy):
    class Mine(GaussianPolicy):
        pass

    policy.__class__ = Mine
    return policy


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked, r"hooks are registered on 'network\.0'"),
        (own_method, "the policy has a distribution_params of its own"),
        (frozen, "not all of its parameters"),
        (parametrized, "not linear layers"),
        (replaced, "not linear layers"),
        (tied, "not all of its parameters"),
        (without_bias, "not all of its parameters"),
        (subclassed, "policy is Mine"),
        (one_log_std, r"its log_std is of shape \(1,\), not \(4,\)"),
        (one_fixed_log_std, r"its log_std is of shape \(1,\), not \(4,\)"),
        (log_std_of_ones_own, "its log_std is not a buffer"),
        (without_units, r"its layers have \[3, 0, 4\] units"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_policy_that_was_changed_is_left_to_autograd(change, reason):
    torch.manual_seed(0)
    policy = change(GaussianPolicy(3, 4, (4, 4), log_std="global").to(F64))
    trajectories = make_steps(policy, (3, 5))
    with (
        parl.backend("cpp"),
        pytest.raises(BackendError, match=rf"linearize: backend 'cpp' cannot be used: .*{reason}"),
    ):
        parl.linearize(policy, trajectories)
    linear = parl.linearize(policy, trajectories)
    assert linear.native_operator() is None
    w = torch.randn(8, dtype=F64)
    total = (w * policy.log_prob(trajectories.observations, trajectories.actions)).sum()
    gradient = torch.autograd.grad(total, [p for p in policy.parameters() if p.requires_grad])
    torch.testing.assert_close(linear.vjp(w), torch.cat([g.reshape(-1) for g in gradient]))


def test_a_method_replaced_on_the_class_is_left_to_autograd(monkeypatch):
    torch.manual_seed(0)
    policy = make_policy("state")
    trajectories = make_steps(policy, (3, 5))
    kernels = parl.linearize(policy, trajectories)
    original = GaussianPolicy.params_log_prob
    with monkeypatch.context() as patch:
        patch.setattr(GaussianPolicy, "params_log_prob", lambda *args: 2 * original(*args))
        close(parl.linearize(policy, trajectories).log_prob, 2 * kernels.log_prob)
    with monkeypatch.context() as patch:
        patch.setattr("parl_core.models.policies.LOG_STD_BOUNDS", (-4.0, 1.0))
        expected = policy.log_prob(trajectories.observations, trajectories.actions).detach()
        close(parl.linearize(policy, trajectories).log_prob, expected)
    assert parl.linearize(policy, trajectories).native_operator() is not None


@pytest.mark.parametrize("head", HEADS)
def test_what_is_stored_with_the_other_sign_is_read_with_its_own(head):
    torch.manual_seed(0)
    policy = make_policy(head)
    trajectories = make_steps(policy, (3, 5))
    expected = parl.linearize(policy, trajectories).log_prob
    for name, tensor in policy.named_parameters():
        tensor.data = torch._neg_view(-tensor.detach())
        assert tensor.is_neg(), name
    for name, tensor in list(policy.named_buffers()):
        policy.register_buffer(name, torch._neg_view(-tensor))
    turned = [torch._neg_view(-t) for t in (trajectories.observations, trajectories.actions)]
    assert all(t.is_neg() for t in turned)
    with parl.backend("cpp"):
        linear = parl.linearize(policy, parl.Trajectories(*turned, trajectories.offsets))
    close(linear.log_prob, expected)
    w = torch.randn(8, dtype=F64)
    close(linear.vjp(torch._neg_view(-w)), linear.vjp(w))


@pytest.mark.parametrize("backend", [None, "cpp", "reference"])
def test_who_computes(backend):
    policy = make_policy("categorical")
    trajectories = make_steps(policy)
    if backend is None:
        linear = parl.linearize(policy, trajectories)
    else:
        with parl.backend(backend):
            linear = parl.linearize(policy, trajectories)
    assert (linear.native_operator() is None) == (backend == "reference")
    assert isinstance(next(linear._graphs())[1], NativeChunk) == (backend != "reference")


def test_actions_out_of_range_are_the_policys_to_refuse():
    policy = make_policy("categorical")
    trajectories = parl.Trajectories(torch.randn(2, 3, dtype=F64), torch.tensor([0, 2]), torch.tensor([0, 2]))
    with pytest.raises(IndexError, match=r"actions must be in 0 … V−1 with V = \d+, got"):
        parl.linearize(policy, trajectories)
