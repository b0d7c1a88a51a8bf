"""What is unbiased, by exact expectation: every sample of a small space once, weighted by its probability.

Each line of the table in `f_divergence`'s docstring is a test here.
"""

import itertools

import pytest
import torch

from parl_core.ops import f_divergence

KINDS = [
    {"kind": kind}
    for kind in (
        "kl",
        "reverse_kl",
        "jensen_shannon",
        "jeffreys",
        "chi_squared",
        "neyman",
        "squared_hellinger",
        "total_variation",
    )
]
KINDS += [{"kind": "alpha", "alpha": alpha} for alpha in (-0.7, 0.0, 0.3, 0.5, 0.8, 1.0, 2.5)]
K3 = [{"kind": kind, "estimator": "k3"} for kind in ("kl", "reverse_kl")]
EXACT = KINDS + K3
IDS = ["-".join(map(str, case.values())) for case in EXACT]


def divergence(kind, p, q, alpha=None, estimator=None):
    """The definition, as a sum."""
    t = p / q
    alpha_terms = {0.0: -t.log(), 1.0: t * t.log()}
    if alpha is not None and alpha not in alpha_terms:
        alpha_terms[alpha] = (t**alpha - alpha * t - (1 - alpha)) / (alpha * (alpha - 1))
    terms = {
        "kl": t * t.log(),
        "reverse_kl": -t.log(),
        "jensen_shannon": 0.5 * (t * t.log() - (1 + t) * ((1 + t) / 2).log()),
        "jeffreys": (t - 1) * t.log(),
        "chi_squared": (t - 1) ** 2,
        "neyman": (1 - t) ** 2 / t,
        "squared_hellinger": 0.5 * (t.sqrt() - 1) ** 2,
        "total_variation": 0.5 * (t - 1).abs(),
        "alpha": alpha_terms.get(alpha, t),
    }
    return (q * terms[kind]).sum()


LOGITS = torch.tensor([[0.3, -1.1, 0.8, 0.0], [-0.5, 0.4, 0.9, -0.2]], dtype=torch.float64)  # of p and q
CLOSE = {"rtol": 1e-11, "atol": 1e-12}


def expectation(logits, sampled_from, **arguments):
    """The exact expectation of an estimate, with samples held fixed."""
    log_p, log_q = logits.log_softmax(-1)
    weights = (log_p if sampled_from == "p" else log_q).exp().detach()
    return f_divergence(log_p - log_q, sampled_from=sampled_from, weights=weights, **arguments)


def with_moving(side):
    """The logits of p and q, as a function of those of one of the two."""
    rows = {"p": 0, "q": 1}
    return LOGITS[rows[side]].clone().requires_grad_(), (
        lambda moving: torch.stack([moving, LOGITS[1]] if side == "p" else [LOGITS[0], moving])
    )


def gradients(function, at, count):
    """Value and derivatives along a fixed direction, one after the other."""
    direction = torch.tensor([0.7, -0.2, 0.4, -1.0], dtype=torch.float64)
    found = [function(at)]
    for _ in range(count):
        (gradient,) = torch.autograd.grad(found[-1], at, create_graph=True)
        found.append(gradient @ direction)
    return torch.stack(found).detach()


def expected(arguments, moving, rest, count):
    return gradients(
        lambda x: divergence(p=rest(x).softmax(-1)[0], q=rest(x).softmax(-1)[1], **arguments), moving, count
    )


@pytest.mark.parametrize("arguments", EXACT, ids=IDS)
@pytest.mark.parametrize(("sampled_from", "moving"), itertools.product("pq", "pq"))
def test_plain_estimates(arguments, sampled_from, moving):
    """Exact in value always; in all derivatives with resting samples, and with moving ones by `on_policy`."""
    at, rest = with_moving(moving)
    truth = expected(arguments, at, rest, 3)
    on_policy = sampled_from == moving
    found = gradients(lambda x: expectation(rest(x), sampled_from, on_policy=on_policy, **arguments), at, 3)
    torch.testing.assert_close(found, truth, **CLOSE)
    if on_policy:
        plain = gradients(lambda x: expectation(rest(x), sampled_from, **arguments), at, 1)
        torch.testing.assert_close(plain[0], truth[0], **CLOSE)
        assert abs(plain[1] - truth[1]) > 1e-4  # and without it the gradient is wrong


@pytest.mark.parametrize(("kind", "side"), [("kl", "p"), ("reverse_kl", "q")])
class TestOfTheMovingDistribution:
    """Schulman's estimators in their own place: samples and gradient of the same distribution."""

    def test_the_gradient_of_k1_vanishes(self, kind, side):
        at, rest = with_moving(side)
        found = gradients(lambda x: expectation(rest(x), side, kind=kind), at, 1)
        torch.testing.assert_close(found[1], torch.zeros_like(found[1]), **CLOSE)

    def test_the_gradient_of_k3_is_that_of_the_other_divergence(self, kind, side):
        at, rest = with_moving(side)
        found = gradients(lambda x: expectation(rest(x), side, kind=kind, estimator="k3"), at, 1)
        other = expected({"kind": {"kl": "reverse_kl", "reverse_kl": "kl"}[kind]}, at, rest, 1)
        torch.testing.assert_close(found[1], other[1], **CLOSE)

    def test_k2_has_a_biased_value_and_an_exact_gradient(self, kind, side):
        at, rest = with_moving(side)
        found = gradients(lambda x: expectation(rest(x), side, kind=kind, estimator="k2"), at, 2)
        truth = expected({"kind": kind}, at, rest, 2)
        torch.testing.assert_close(found[1], truth[1], **CLOSE)
        assert abs(found[0] - truth[0]) > 1e-2
        assert abs(found[2] - truth[2]) > 1e-2

    def test_the_bias_of_k2_is_of_third_order(self, kind, side):
        """Halving the distance of p from q divides it by eight."""
        errors = []
        for size in (0.02, 0.01):
            logits = torch.stack([LOGITS[1] + size * LOGITS[0], LOGITS[1]])
            p, q = logits.softmax(-1)
            errors.append((expectation(logits, side, kind=kind, estimator="k2") - divergence(kind, p, q)).item())
        assert errors[0] / errors[1] == pytest.approx(8.0, rel=0.05)


@pytest.mark.parametrize("sampled_from", "pq")
@pytest.mark.parametrize("moving", "pq")
def test_k2_with_importance_weights_is_biased(sampled_from, moving):
    """Away from its own place, kl with samples from p and reverse_kl from q, k2 is biased in value and gradient."""
    kind = {"p": "reverse_kl", "q": "kl"}[sampled_from]
    at, rest = with_moving(moving)
    found = gradients(lambda x: expectation(rest(x), sampled_from, kind=kind, estimator="k2"), at, 1)
    truth = expected({"kind": kind}, at, rest, 1)
    assert (found - truth).abs().min() > 1e-3


@pytest.mark.parametrize("sampled_from", "pq")
def test_self_normalized_is_exact_over_all_samples(sampled_from):
    """Weighted by all the probabilities, a shift of the log-ratios changes nothing: all its bias is that of few samples."""
    log_p, log_q = LOGITS.log_softmax(-1)
    weights = (log_p if sampled_from == "p" else log_q).exp()
    for arguments in KINDS:
        found = f_divergence(
            log_p - log_q + 2.0, weights=weights, sampled_from=sampled_from, self_normalized=True, **arguments
        )
        torch.testing.assert_close(found, divergence(p=log_p.exp(), q=log_q.exp(), **arguments), **CLOSE)


def test_the_bias_of_self_normalized_falls_with_the_number_of_samples():
    """Enumerated over all tuples of n samples: n times the bias settles."""
    log_p, log_q = LOGITS.log_softmax(-1)
    truth = divergence("kl", log_p.exp(), log_q.exp())
    scaled = []
    for count in (3, 4, 5, 6):
        samples = torch.tensor(list(itertools.product(range(4), repeat=count)))  # (4ⁿ, n)
        probability = log_q[samples].sum(1).exp()
        estimates = torch.func.vmap(lambda r: f_divergence(r, "kl", self_normalized=True))((log_p - log_q)[samples])
        scaled.append(count * ((probability * estimates).sum() - truth).item())
    assert 0.1 < abs(scaled[-1]) < 1.0
    assert abs(scaled[3] - scaled[2]) < abs(scaled[2] - scaled[1]) < abs(scaled[1] - scaled[0])


@pytest.mark.parametrize(
    "arguments", [*KINDS[:3], *K3], ids=["kl", "reverse_kl", "jensen_shannon", "kl-k3", "reverse_kl-k3"]
)
@pytest.mark.parametrize("on_policy", [False, True])
def test_trajectories(arguments, on_policy):
    """All trajectories of a process that stops at random: one action, or after action 0 a second one of another policy.

    D_f is that of the trajectories' distributions, on policy with respect to p's parameters.
    """
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(2, 3, generator=generator, dtype=torch.float64).requires_grad_()
    other = torch.randn(2, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    paths = [[(0, 0), (1, a)] for a in range(3)] + [[(0, 1)], [(0, 2)]]
    offsets = torch.tensor([0, *map(len, paths)]).cumsum(0)
    steps = torch.tensor([step for path in paths for step in path])

    def log_probs(table):
        return table[steps[:, 0], steps[:, 1]]

    def of_paths(table):
        return torch.stack([part.sum() for part in log_probs(table).split([len(path) for path in paths])])

    log_p, log_q = of_paths(theta.log_softmax(-1)), of_paths(other)
    truth = divergence(p=log_p.exp(), q=log_q.exp(), **arguments)
    found = f_divergence(
        log_probs(theta.log_softmax(-1)) - log_probs(other),
        offsets=offsets,
        weights=(log_p if on_policy else log_q).exp().detach(),
        sampled_from="p" if on_policy else "q",
        on_policy=on_policy,
        **arguments,
    )
    torch.testing.assert_close(found, truth, **CLOSE)
    slope = torch.autograd.grad(found, theta, create_graph=True)[0]
    expected_slope = torch.autograd.grad(truth, theta, create_graph=True)[0]
    torch.testing.assert_close(slope, expected_slope, **CLOSE)
    direction = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(slope, theta, direction)[0],
        torch.autograd.grad(expected_slope, theta, direction)[0],
        **CLOSE,
    )
