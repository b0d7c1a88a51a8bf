"""Generators of f-divergences as they are printed, and what their estimates are expected to be."""

import functools

import pytest
import torch

from parl_core.ops.f_divergence_terms import term_of

# The generators as they are printed, of the ratio t.
GENERATORS = {
    "kl": lambda t: t * t.log(),
    "reverse_kl": lambda t: -t.log(),
    "jensen_shannon": lambda t: 0.5 * (t * t.log() - (1 + t) * ((1 + t) / 2).log()),
    "jeffreys": lambda t: (t - 1) * t.log(),
    "chi_squared": lambda t: (t - 1) ** 2,
    "neyman": lambda t: (t - 1) ** 2 / t,
    "squared_hellinger": lambda t: 0.5 * (t.sqrt() - 1) ** 2,
    "total_variation": lambda t: 0.5 * (t - 1).abs(),
    "kl, k2": lambda t: t * t.log() ** 2 / 2,
    "kl, k3": lambda t: t * t.log() - t + 1,
    "reverse_kl, k2": lambda t: t.log() ** 2 / 2,
    "reverse_kl, k3": lambda t: t - 1 - t.log(),
    **{f"alpha {a}": lambda t, a=a: (t**a - a * t - (1 - a)) / (a * (a - 1)) for a in (-1.3, 0.2, 0.5, 0.7, 3.0)},
    "alpha 1.0": lambda t: t * t.log() - t + 1,
    "alpha 0.0": lambda t: t - 1 - t.log(),
}


def arguments(name):
    """The arguments of `f_divergence` that a name of GENERATORS stands for."""
    if name.startswith("alpha"):
        return {"kind": "alpha", "alpha": float(name.split()[1])}
    kind, *estimator = name.split(", ")
    return {"kind": kind, "estimator": estimator[0]} if estimator else {"kind": kind}


MODES = [(sampled_from, on_policy) for sampled_from in "qp" for on_policy in (False, True)]
NAMES = pytest.mark.parametrize("name", GENERATORS)


def case_term(name, sampled_from, on_policy):
    given = {"alpha": None, "estimator": None, **arguments(name)}
    return term_of(given["kind"], given["alpha"], given["estimator"], sampled_from, on_policy)


def plain_summand(name, sampled_from, log_ratio):
    """E_q averages f(t), E_p averages f(t)/t."""
    t = log_ratio.exp()
    return GENERATORS[name](t) / (t if sampled_from == "p" else 1)


def derivatives(function, x, count=2):
    """[f, f', …] at every element of x."""
    x = x.detach().requires_grad_()
    found = [function(x)]
    for _ in range(count):
        found.append(torch.autograd.grad(found[-1].sum(), x, create_graph=True, materialize_grads=True)[0])
        if not found[-1].requires_grad:
            found[-1] = found[-1] + 0 * x
    return [part.detach() for part in found]


@functools.cache
def expected_of_normals(name, sampled_from, on_policy, dtype):
    """131 log-ratios and what is expected of them in float64, for all backends alike."""
    x = log_ratios(131, dtype=dtype)
    x[:3] = torch.tensor([1e-3, -1e-3, 0.4])
    return x, expected_jet(name, sampled_from, on_policy, x.double())


def expected_jet(name, sampled_from, on_policy, x, count=2):
    """Derivatives of the summand; on-policy the samples' density is that at x₀ while it moves from there."""
    if not on_policy:
        return derivatives(lambda r: plain_summand(name, sampled_from, r), x, count)
    x0 = x.detach()
    if sampled_from == "p":  # q/p₀ · f(p/q)
        return derivatives(lambda r: torch.exp(-x0) * GENERATORS[name](r.exp()), x, count)
    # samples of q₀: p/q₀ · f̃(q/p), f̃(s) = s f(1/s)
    return derivatives(lambda r: torch.exp(x0) * torch.exp(-r) * GENERATORS[name](r.exp()), x, count)


def log_ratios(count, seed=0, dtype=torch.float64, spread=1.5):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(count, generator=generator, dtype=torch.float64)).to(dtype)


TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6}
