"""Closed forms against numerical integrals, sums and hand-computed cases; the variational bound against its optimum."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from parl_core.models.policies import CategoricalPolicy, GaussianPolicy
from parl_core.ops import (
    categorical_f_divergence,
    f_divergence,
    f_divergence_bound,
    gaussian_f_divergence,
)
from parl_core.ops.f_divergence_terms import KINDS

CASES = [(kind, None) for kind in KINDS if kind != "alpha"]
CASES += [("alpha", alpha) for alpha in (-0.6, 0.0, 0.3, 0.5, 0.8, 1.0, 1.7)]
WITH_GAUSSIAN = [case for case in CASES if case[0] not in ("jensen_shannon", "total_variation")]


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integral(log_p, log_q, weights, kind, alpha):
    """∫ q f(p/q), as the exact expectation of the plain estimate."""
    estimator = "k3" if kind in ("kl", "reverse_kl") else None
    return f_divergence(log_p - log_q, kind, weights=weights * log_q.exp(), alpha=alpha, estimator=estimator)


def log_normal(x, mean, log_std):
    return -0.5 * ((x - mean) * math.exp(-log_std)) ** 2 - log_std - 0.5 * math.log(2 * math.pi)


@pytest.mark.parametrize(("kind", "alpha"), WITH_GAUSSIAN)
class TestGaussian:
    def test_against_an_integral(self, kind, alpha):
        """By the trapezoidal rule, which converges faster than any power for such integrands."""
        for p, q in [((0.3, -0.1), (-0.4, 0.15)), ((0.0, 0.2), (0.5, 0.2)), ((1.0, -0.3), (1.0, 0.0))]:
            x = torch.linspace(-28, 28, 20_001, dtype=torch.float64)
            weights = torch.full_like(x, 56 / 20_000)
            expected = integral(log_normal(x, *p), log_normal(x, *q), weights, kind, alpha)
            found = gaussian_f_divergence(
                torch.tensor([p], dtype=torch.float64), torch.tensor([q], dtype=torch.float64), kind, alpha=alpha
            )
            assert found.item() == pytest.approx(expected.item(), rel=1e-9)

    def test_two_dimensions(self, kind, alpha):
        x = torch.linspace(-16, 16, 401, dtype=torch.float64)
        p, q = torch.tensor([0.3, -0.2, -0.1, 0.2]), torch.tensor([-0.2, 0.1, 0.1, 0.15])
        log_p = log_normal(x, p[0], p[2])[:, None] + log_normal(x, p[1], p[3])
        log_q = log_normal(x, q[0], q[2])[:, None] + log_normal(x, q[1], q[3])
        weights = torch.full((401 * 401,), (32 / 400) ** 2, dtype=torch.float64)
        expected = integral(log_p.reshape(-1), log_q.reshape(-1), weights, kind, alpha)
        found = gaussian_f_divergence(p.double(), q.double(), kind, alpha=alpha)
        assert found.item() == pytest.approx(expected.item(), rel=1e-8)

    def test_derivatives(self, kind, alpha):
        p, q = (random(3, 4, seed=seed, scale=0.1).requires_grad_() for seed in (0, 1))

        def divergence(p, q):
            return gaussian_f_divergence(p, q, kind, alpha=alpha)

        assert gradcheck(divergence, (p, q))
        assert gradgradcheck(divergence, (p, q))

    def test_close_ones_lose_no_digits(self, kind, alpha):
        """D ≈ ½ f''(1) times the Fisher metric (1/σ², 2); a millionth apart, in double precision."""
        step = 1e-6
        p, q = torch.tensor([step, step], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        curvature = {"jeffreys": 2.0, "chi_squared": 2.0, "neyman": 2.0, "squared_hellinger": 0.25}.get(kind, 1.0)
        found = gaussian_f_divergence(p, q, kind, alpha=alpha).item()
        assert found == pytest.approx(0.5 * curvature * 3 * step**2, rel=2e-3)
        assert gaussian_f_divergence(q, q, kind, alpha=alpha).item() == 0.0


def test_gaussian_where_it_does_not_exist():
    """χ² needs σ_p² < 2 σ_q²; Neyman's the other way round; α ∈ [0, 1] nothing."""
    wide = torch.tensor([[0.0, 0.5 * math.log(1.9)], [0.0, 0.5 * math.log(2.0)], [0.0, 1.0]], dtype=torch.float64)
    unit = torch.zeros_like(wide)
    chi = gaussian_f_divergence(wide, unit, "chi_squared")
    # I₂ = σ_q²/(σ_p √(2σ_q² − σ_p²))
    assert chi[0].item() == pytest.approx(1 / math.sqrt(1.9 * 0.1) - 1)
    assert chi[2].item() == math.inf
    assert gaussian_f_divergence(unit, wide, "neyman")[2].item() == math.inf
    assert gaussian_f_divergence(unit, wide, "chi_squared").isfinite().all()
    assert gaussian_f_divergence(wide, unit, "alpha", alpha=0.99).isfinite().all()
    both = torch.cat([wide[2:, :1], wide[:1, :1], wide[2:, 1:], wide[:1, 1:]], dim=1)  # one dimension is enough
    assert gaussian_f_divergence(both, torch.zeros_like(both), "chi_squared").item() == math.inf
    params = wide[2:].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(gaussian_f_divergence(params, unit[2:], "chi_squared").sum(), params)
    assert gradient.isnan().any()


@pytest.mark.parametrize(("kind", "alpha"), CASES)
class TestCategorical:
    def test_against_the_sum(self, kind, alpha):
        logits_p, logits_q = random(2, 5, 7, seed=0), random(2, 5, 7, seed=1)
        found = categorical_f_divergence(logits_p + 3.0, logits_q, kind, alpha=alpha)
        log_p, log_q = logits_p.log_softmax(-1), logits_q.log_softmax(-1)
        ones = torch.ones(7, dtype=torch.float64)
        for i in range(2):
            for j in range(5):
                expected = integral(log_p[i, j], log_q[i, j], ones, kind, alpha)
                assert found[i, j].item() == pytest.approx(expected.item(), rel=1e-12)

    def test_derivatives(self, kind, alpha):
        p, q = (random(2, 3, seed=seed).requires_grad_() for seed in (3, 4))

        def divergence(p, q):
            return categorical_f_divergence(p, q, kind, alpha=alpha)

        assert gradcheck(divergence, (p, q))
        assert gradgradcheck(divergence, (p, q))

    def test_close_ones_lose_no_digits(self, kind, alpha):
        """q uniform on two actions, p = q ± e: ½ f''(1) (2e)², but e for the total variation."""
        e = 1e-7
        q = torch.zeros(2, dtype=torch.float64)
        p = torch.tensor([math.log1p(2 * e), math.log1p(-2 * e)], dtype=torch.float64).requires_grad_()
        curvature = {
            "jeffreys": 2.0, "chi_squared": 2.0, "neyman": 2.0, "squared_hellinger": 0.25, "jensen_shannon": 0.25
        }.get(kind, 1.0)  # fmt: skip
        found = categorical_f_divergence(p, q, kind, alpha=alpha)
        expected = e if kind == "total_variation" else 2 * curvature * e**2
        assert found.item() == pytest.approx(expected, rel=1e-6)
        (gradient,) = torch.autograd.grad(found, p)
        # d/dlogit of ½ f''(1) (2e)² at e = (l₁ − l₂)/4
        slope = 0.25 if kind == "total_variation" else curvature * e
        assert gradient.tolist() == pytest.approx([slope, -slope], rel=1e-6)

    def test_equal_ones(self, kind, alpha):
        p = random(4, seed=5).requires_grad_()
        found = categorical_f_divergence(p, p.detach(), kind, alpha=alpha)
        assert found.item() == 0.0
        assert torch.autograd.grad(found, p)[0].abs().max() < 1e-15

    def test_far_apart(self, kind, alpha):
        """Almost disjoint: finite wherever the divergence is, in single precision."""
        p, q = torch.tensor([0.0, -60.0]), torch.tensor([-60.0, 0.0])
        found = categorical_f_divergence(p, q, kind, alpha=alpha).item()
        exact = categorical_f_divergence(p.double(), q.double(), kind, alpha=alpha).item()
        assert found == pytest.approx(exact, rel=1e-5) or exact > 3e38


def test_chi_squared_of_ratios_beyond_the_dtype():
    """p²/q is finite where p/q is not."""
    p, q = torch.tensor([-30.0, 0.0]), torch.tensor([-125.0, 0.0])
    found = categorical_f_divergence(p, q, "chi_squared").item()
    assert found == pytest.approx(math.exp(-60.0 + 125.0), rel=1e-4)
    assert categorical_f_divergence(q, p, "neyman").item() == found


def test_of_policies():
    """What the policies' networks say goes in as it is; a Gaussian one agrees with many of its samples."""
    torch.manual_seed(0)
    observations = torch.randn(3, 4)
    policies = [GaussianPolicy(4, 2, hidden=(8,)) for _ in range(2)]
    found = gaussian_f_divergence(*(policy.distribution_params(observations) for policy in policies), "kl")
    assert found.shape == (3,)
    many = observations[:1].expand(100_000, 4)
    actions, log_p = policies[0].sample(many)
    ratios = (log_p - policies[1].log_prob(many, actions)).detach()
    # Five standard errors of the mean: a false alarm in 2 million, and the seed is fixed.
    assert abs(ratios.mean() - found[0]) < 5 * ratios.std() / 100_000**0.5
    discrete = [CategoricalPolicy(4, 3) for _ in range(2)]
    logits = [policy.distribution_params(observations) for policy in discrete]
    log_p, log_q = (x.log_softmax(-1) for x in logits)
    torch.testing.assert_close(
        categorical_f_divergence(*logits, "kl"), (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-4, atol=1e-6
    )


GENERATORS = {
    "kl": lambda t: t * t.log(),
    "reverse_kl": lambda t: -t.log(),
    "jensen_shannon": lambda t: 0.5 * (t * t.log() - (1 + t) * ((1 + t) / 2).log()),
    "jeffreys": lambda t: (t - 1) * t.log(),
    "chi_squared": lambda t: (t - 1) ** 2,
    "neyman": lambda t: (t - 1) ** 2 / t,
    "squared_hellinger": lambda t: 0.5 * (t.sqrt() - 1) ** 2,
    "total_variation": lambda t: 0.5 * (t - 1).abs(),
}


class TestBound:
    @pytest.mark.parametrize(("kind", "alpha"), CASES)
    def test_conjugate(self, kind, alpha):
        """f*(T) = sup_t tT − f(t), over a fine grid of t, for the T of unconstrained critics."""
        t = torch.linspace(-8, 8, 400_001, dtype=torch.float64).exp()
        if kind == "alpha":
            plain = {0.0: t - 1 - t.log(), 1.0: t * t.log() - t + 1}.get(alpha)
            f = plain if plain is not None else (t**alpha - alpha * t - (1 - alpha)) / (alpha * (alpha - 1))
        else:
            f = GENERATORS[kind](t)
        zero = torch.zeros(1, dtype=torch.float64)
        for critic in (-2.0, -0.3, 0.0, 0.7, 2.0):
            v = torch.tensor([critic], dtype=torch.float64)
            # The bound is affine in the two parts: each alone is its difference from critics at 0.
            at_zero = f_divergence_bound(zero, zero, kind, alpha=alpha)
            slope_zero = {"kl": 1.0, "reverse_kl": -1.0}.get(kind, 0.0)
            slope = f_divergence_bound(v, zero, kind, alpha=alpha) - at_zero + slope_zero
            conjugate = slope_zero - at_zero - (f_divergence_bound(zero, v, kind, alpha=alpha) - at_zero)
            assert conjugate.item() == pytest.approx((t * slope - f).max().item(), abs=2e-8)

    @pytest.mark.parametrize(("kind", "alpha"), CASES)
    def test_a_lower_bound_that_the_log_ratio_reaches(self, kind, alpha):
        log_p, log_q = random(6, seed=1).log_softmax(0), random(6, seed=2).log_softmax(0)
        p, q = (torch.round(x.exp() * 1000).long() for x in (log_p, log_q))
        log_p, log_q = (p / p.sum()).double().log(), (q / q.sum()).double().log()
        truth = categorical_f_divergence(log_p, log_q, kind, alpha=alpha).item()

        def bound(critic):
            return f_divergence_bound(critic.repeat_interleave(p), critic.repeat_interleave(q), kind, alpha=alpha)

        critic = (log_p - log_q).requires_grad_()
        if kind == "total_variation":
            assert bound(50.0 * critic).item() == pytest.approx(truth, rel=1e-6)
        else:
            best = bound(critic)
            assert best.item() == pytest.approx(truth, rel=1e-6)
            assert torch.autograd.grad(best, critic)[0].abs().max() < 1e-6
        for seed in range(20):
            assert bound(random(6, seed=seed)).item() <= truth + 1e-7

    @pytest.mark.parametrize(("kind", "alpha"), CASES)
    def test_derivatives(self, kind, alpha):
        critics = tuple(random(4, seed=seed).requires_grad_() for seed in (0, 1))
        assert gradcheck(lambda p, q: f_divergence_bound(p, q, kind, alpha=alpha), critics)
        assert gradgradcheck(lambda p, q: f_divergence_bound(p, q, kind, alpha=alpha), critics)


ZERO = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: gaussian_f_divergence(ZERO, ZERO[:1], "kl"),
            ValueError,
            "params_p and params_q must have the same shape",
        ),
        (
            lambda: gaussian_f_divergence(ZERO[:, :3], ZERO[:, :3], "kl"),
            ValueError,
            r"params_p must be of shape \(…, 2·da\)",
        ),
        (lambda: gaussian_f_divergence(ZERO, ZERO, "jensen_shannon"), ValueError, "'jensen_shannon' has none"),
        (lambda: gaussian_f_divergence(ZERO, ZERO, "alpha"), ValueError, "alpha must be a finite number"),
        (
            lambda: gaussian_f_divergence(ZERO.long(), ZERO, "kl"),
            TypeError,
            "params_p must be of a floating-point dtype",
        ),
        (lambda: categorical_f_divergence(ZERO, ZERO[0], "kl"), ValueError, "logits_p and logits_q must have the same"),
        (lambda: categorical_f_divergence(ZERO, ZERO, "kls"), ValueError, "Unknown kind 'kls': did you mean kl"),
        (lambda: categorical_f_divergence(ZERO, ZERO, "kl", alpha=1.0), ValueError, "alpha must be left out"),
        (lambda: f_divergence_bound(ZERO[:0], ZERO, "kl"), ValueError, "critic_p must hold at least one value"),
        (lambda: f_divergence_bound(ZERO, ZERO.long(), "kl"), TypeError, "critic_q must be of a floating-point dtype"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
