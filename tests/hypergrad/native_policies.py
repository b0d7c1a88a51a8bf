"""The package's own policies, steps for them, and both of their linearizations."""

import copy
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


def both(policy, trajectories, backend="cpp", device="cpu", **options):
    """The linearization of the kernels of `backend`, on `device`, and autograd's on the CPU."""
    with parl.backend(backend):
        kernels = parl.linearize(copy.deepcopy(policy).to(device), trajectories.to(device), **options)
    with parl.backend("reference"):
        return kernels, parl.linearize(policy, trajectories, **options)


def check_products(policy, trajectories, tolerance=1e-12, backend="cpp", device="cpu", **options):
    """All products of both."""
    kernels, autograd = both(policy, trajectories, backend, device, **options)
    dtype = autograd.log_prob.dtype
    w, f, g = torch.randn(3, trajectories.num_steps, dtype=dtype)
    v = torch.randn(autograd.num_params, dtype=dtype)
    ws, fs, gs, vs = (tensor.to(device) for tensor in (w, f, g, v))
    assert kernels.num_params == autograd.num_params
    close(kernels.log_prob, autograd.log_prob, tolerance)
    close(kernels.jvp(vs), autograd.jvp(v), tolerance)
    close(kernels.vjp(ws), autograd.vjp(w), tolerance)
    close(kernels.fisher_vp(fs, vs), autograd.fisher_vp(f, v), tolerance)
    for ours, expected in zip(kernels.jvp_and_hvp(ws, vs), autograd.jvp_and_hvp(w, v), strict=True):
        close(ours, expected, tolerance)
    close(kernels.scores(), autograd.scores(), tolerance)
    close(kernels.scores(ws), autograd.scores(w), tolerance)
    close(
        kernels.second_order(vs, hessian=ws, fisher=fs, scores=gs),
        autograd.second_order(v, hessian=w, fisher=f, scores=g),
        tolerance,
    )


def close(ours, expected, tolerance=1e-12):
    """Up to `tolerance` of the largest element, wherever `ours` is."""
    ours = ours.to(expected.device)
    assert ours.shape == expected.shape and ours.dtype == expected.dtype
    if expected.numel():
        assert (ours - expected).abs().max() <= tolerance * expected.abs().max(), (ours, expected)
