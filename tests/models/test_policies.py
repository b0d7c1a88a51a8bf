"""Log-probabilities against torch.distributions, and the errors of wrong inputs."""

from __future__ import annotations

import pytest
import torch
from torch import distributions as td

from parl_core.models.policies import CategoricalPolicy, GaussianPolicy

F64 = torch.float64


@pytest.mark.parametrize("log_std", ["state", "global", -0.7])
@pytest.mark.parametrize("activation", ["tanh", "relu", "silu"])
def test_gaussian_log_prob(log_std, activation):
    torch.manual_seed(0)
    policy = GaussianPolicy(3, 2, (8, 8), activation, log_std).to(F64)
    observations, actions = torch.randn(7, 3, dtype=F64), torch.randn(7, 2, dtype=F64)
    mean, log = policy.mean_and_log_std(observations)
    expected = td.Independent(td.Normal(mean, log.exp()), 1).log_prob(actions)
    torch.testing.assert_close(policy.log_prob(observations, actions), expected)
    assert ((log >= -5) & (log <= 2)).all()


def test_squashed_log_prob_and_samples_agree_with_the_transformed_distribution():
    torch.manual_seed(0)
    policy = GaussianPolicy(3, 2, (8,), squash=True).to(F64)
    observations = torch.randn(50, 3, dtype=F64)
    actions, log_prob = policy.sample(observations, torch.Generator().manual_seed(1))
    mean, log = policy.mean_and_log_std(observations)
    base = td.Independent(td.Normal(mean, log.exp()), 1)
    expected = td.TransformedDistribution(base, td.TanhTransform()).log_prob(actions)
    torch.testing.assert_close(log_prob, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(policy.log_prob(observations, actions), log_prob, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(policy.mode(observations), torch.tanh(mean))


def test_squashed_log_prob_is_finite_with_finite_gradients_on_the_boundary():
    policy = GaussianPolicy(3, 2, (8,), squash=True)
    actions = torch.tensor([[1.0, -1.0], [1.0, 0.0]])
    log_prob = policy.log_prob(torch.randn(2, 3), actions)
    log_prob.sum().backward()
    assert torch.isfinite(log_prob).all()
    assert all(torch.isfinite(p.grad).all() for p in policy.parameters())


def test_categorical():
    torch.manual_seed(0)
    policy = CategoricalPolicy(3, 4, (5,)).to(F64)
    observations, actions = torch.randn(6, 3, dtype=F64), torch.randint(4, (6,))
    expected = td.Categorical(logits=policy.logits(observations)).log_prob(actions)
    torch.testing.assert_close(policy.log_prob(observations, actions), expected)
    torch.testing.assert_close(policy.log_prob(observations, actions.unsqueeze(1)), expected)
    sampled, log_prob = policy.sample(observations)
    torch.testing.assert_close(log_prob, policy.log_prob(observations, sampled))
    assert torch.equal(policy.mode(observations), policy.logits(observations).argmax(-1))


def test_sampling_frequencies():
    """Chi-square test with 3 degrees of freedom; 25 is exceeded with probability 1.5e-5 by a right sampler."""
    policy = CategoricalPolicy(1, 4)
    observations = torch.ones(20_000, 1)
    actions, _ = policy.sample(observations, torch.Generator().manual_seed(0))
    expected = policy.logits(observations[:1]).softmax(-1)[0].detach() * 20_000
    counts = torch.bincount(actions, minlength=4)
    assert float(((counts - expected) ** 2 / expected).sum()) < 25


def test_wrong_inputs_are_named():
    policy = GaussianPolicy(3, 2)
    with pytest.raises(ValueError, match=r"observations must have shape \(T, do\) with do = 3, got \(5, 4\)"):
        policy.log_prob(torch.zeros(5, 4), torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"actions must have shape \(T, da\) = \(5, 2\), got \(5, 1\)"):
        policy.log_prob(torch.zeros(5, 3), torch.zeros(5, 1))
    with pytest.raises(TypeError, match=r"observations must be floating-point numbers, got torch\.int64"):
        CategoricalPolicy(3, 4).log_prob(torch.zeros(5, 3, dtype=torch.int64), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="log_std must be"):
        GaussianPolicy(3, 2, log_std="free")
    with pytest.raises(ValueError, match="did you mean relu"):
        GaussianPolicy(3, 2, activation="rellu")
    with pytest.raises(TypeError, match="actions must be integers"):
        CategoricalPolicy(3, 4).log_prob(torch.zeros(5, 3), torch.zeros(5))
    with pytest.raises(ValueError, match="T = 5"):
        CategoricalPolicy(3, 4).log_prob(torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64))
