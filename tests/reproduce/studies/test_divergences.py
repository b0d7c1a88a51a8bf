"""f-divergences against hand-computed cases, expansions, identities and extremes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from parl_core.errors import NonFiniteError
from parl_core.reproduce.studies.divergences import DIVERGENCES, f_divergences

SYMMETRIC = ("total variation", "squared Hellinger", "Jensen-Shannon", "Jeffreys")


def _log_distributions(seed: int, size: int = 7, spread: float = 2.0):
    logits = spread * np.random.default_rng(seed).normal(size=(2, size))
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_two_points_by_hand():
    """p = (1/2, 1/2), q = (1/4, 3/4)."""
    found = f_divergences(np.log([0.5, 0.5]), np.log([0.25, 0.75]))
    assert found == pytest.approx(
        {
            "total variation": 1 / 4,
            "squared Hellinger": 1 - math.sqrt(1 / 8) - math.sqrt(3 / 8),
            "Jensen-Shannon": 0.25 * (math.log(4 / 3) + math.log(4 / 5))
            + 0.125 * math.log(2 / 3)
            + 0.375 * math.log(6 / 5),
            "KL": 0.5 * math.log(4 / 3),
            "reverse KL": 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2),
            "Jeffreys": 0.25 * math.log(3),
            "chi-squared": 1 / 3,
            "Neyman chi-squared": 1 / 4,
        },
        rel=1e-13,
    )
    assert tuple(found) == DIVERGENCES


def test_against_the_plain_sums():
    """On distributions that are neither close nor extreme, the definitions as they stand serve."""
    for seed in range(5):
        log_p, log_q = _log_distributions(seed)
        p, q = np.exp(log_p), np.exp(log_q)
        m = 0.5 * (p + q)
        plain = {
            "total variation": 0.5 * np.abs(p - q).sum(),
            "squared Hellinger": 1 - np.sqrt(p * q).sum(),
            "Jensen-Shannon": 0.5 * (p * np.log(p / m)).sum() + 0.5 * (q * np.log(q / m)).sum(),
            "KL": (p * np.log(p / q)).sum(),
            "reverse KL": (q * np.log(q / p)).sum(),
            "Jeffreys": ((p - q) * np.log(p / q)).sum(),
            "chi-squared": ((p - q) ** 2 / q).sum(),
            "Neyman chi-squared": ((p - q) ** 2 / p).sum(),
        }
        assert f_divergences(log_p, log_q) == pytest.approx(plain, rel=1e-12)


def test_close_distributions_lose_no_digits():
    """q uniform on two points, p = q ± e: leading terms in e, where the plain sums would give noise."""
    e = 1e-9
    found = f_divergences(math.log(0.5) + np.log1p([2 * e, -2 * e]), np.log([0.5, 0.5]))
    leading = {
        "total variation": e,
        "squared Hellinger": e**2 / 2,
        "Jensen-Shannon": e**2 / 2,
        "KL": 2 * e**2,
        "reverse KL": 2 * e**2,
        "Jeffreys": 4 * e**2,
        "chi-squared": 4 * e**2,
        "Neyman chi-squared": 4 * e**2,
    }
    assert found == pytest.approx(leading, rel=1e-6, abs=0)


def test_equal_distributions_have_none():
    log_p, _ = _log_distributions(0)
    assert max(f_divergences(log_p, log_p).values()) < 1e-30  # not 0: the mixture of two equals is off by a rounding


def test_identities_and_ranges():
    for seed in range(50):
        log_p, log_q = _log_distributions(seed, spread=5.0)
        found, swapped = f_divergences(log_p, log_q), f_divergences(log_q, log_p)
        for name in SYMMETRIC:
            assert found[name] == pytest.approx(swapped[name], rel=1e-12)
        assert found["KL"] == pytest.approx(swapped["reverse KL"], rel=1e-12)
        assert found["chi-squared"] == pytest.approx(swapped["Neyman chi-squared"], rel=1e-12)
        assert found["Jeffreys"] == pytest.approx(found["KL"] + found["reverse KL"], rel=1e-12)
        assert 0 < found["total variation"] <= 1
        assert found["squared Hellinger"] <= found["total variation"]
        assert found["Jensen-Shannon"] <= math.log(2) * found["total variation"]
        assert math.log1p(found["chi-squared"]) >= found["KL"]  # Jensen's inequality


def test_almost_disjoint_distributions():
    """All but e^−300 of each where the other has e^−300; ratios of e^±300, whose squares are beyond float64."""
    found = f_divergences([0.0, -300.0], [-300.0, 0.0])
    assert found["total variation"] == pytest.approx(1.0)
    assert found["squared Hellinger"] == pytest.approx(1.0)
    assert found["Jensen-Shannon"] == pytest.approx(math.log(2))
    assert found["KL"] == pytest.approx(300.0)
    assert found["Jeffreys"] == pytest.approx(600.0)
    far = f_divergences([0.0, -600.0], [-600.0, 0.0])
    assert far["KL"] == pytest.approx(600.0)
    assert math.log(far["chi-squared"]) == pytest.approx(600.0)


@pytest.mark.parametrize("name", ["chi-squared", "Neyman chi-squared"])
def test_a_chi_squared_beyond_float64_is_told(name):
    one, other = [math.log(0.5), math.log(0.5)], [-800.0, 0.0]
    with pytest.raises(OverflowError, match=rf"^{name} is e\^799, beyond float64"):
        f_divergences(*((one, other) if name == "chi-squared" else (other, one)))


@pytest.mark.parametrize(
    ("log_p", "log_q", "error", "words"),
    [
        ([0.0], np.log([0.5, 0.5]), ValueError, r"log_q must have shape \(1,\)"),
        ([[0.0]], [[0.0]], ValueError, r"log_p must have shape \(N,\)"),
        ([], [], ValueError, "N at least 1"),
        ([0.0, -np.inf], [0.0, -800.0], NonFiniteError, "log_p must be finite, got -inf"),
        ([0.0], [-0.1], ValueError, "log_q must hold the logarithms of probabilities that sum to 1, got a sum of 0.9"),
    ],
)
def test_what_is_no_distribution_is_refused(log_p, log_q, error, words):
    with pytest.raises(error, match=words):
        f_divergences(log_p, log_q)
