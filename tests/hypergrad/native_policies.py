"""The package's own policies, steps for them, and both of their linearizations."""

import itertools

import torch

import parl_core as parl
from parl_core.models.policies import CategoricalPolicy, GaussianPolicy

F64 = torch.float64
HEADS = ("state", "global", "fixed", "squashed", "categorical")
LENGTHS = (130, 0, 77, 1, 300, 1, 0)  # blocks are 112 steps at most


def make_policy(head, hidden=(5,), activation="tanh", obs_dim=3, act_dim=2, dtype=F64):
    """Its parameters are larger than at the start, so that no derivative is nearly zero."""
    if head == "categorical":
        policy = CategoricalPolicy(obs_dim, act_dim, hidden, activation)
    else:
        log_std = {"fixed": -0.3, "squashed": "state"}.get(head, head)
        policy = GaussianPolicy(obs_dim, act_dim, hidden, activation, log_std, squash=head == "squashed")
    policy = policy.to(dtype)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return policy


def make_steps(policy, lengths=LENGTHS, dtype=F64):
    total = sum(lengths)
    if isinstance(policy, CategoricalPolicy):
        actions = torch.randint(policy.num_actions, (total,))
    else:
        actions = torch.rand(total, policy.act_dim, dtype=dtype) * 1.8 - 0.9
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    return parl.Trajectories(torch.randn(total, policy.obs_dim, dtype=dtype), actions, offsets)


def both(policy, trajectories, **options):
    """The kernels' linearization, and autograd's."""
    with parl.backend("cpp"):
        kernels = parl.linearize(policy, trajectories, **options)
    with parl.backend("reference"):
        return kernels, parl.linearize(policy, trajectories, **options)


def close(ours, expected, tolerance=1e-12):
    """Up to `tolerance` of the largest element."""
    assert ours.shape == expected.shape and ours.dtype == expected.dtype
    if expected.numel():
        assert (ours - expected).abs().max() <= tolerance * expected.abs().max(), (ours, expected)
