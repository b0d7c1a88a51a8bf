"""λ-returns against Sutton & Barto's recursion and the weighted mean of n-step returns."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from parl_core.ops import gae, td_lambda
from tests.ops.ragged import LENGTHS, doubles, offsets_of, pieces, random_values

SHORT = [4, 0, 1, 6]


def recursion(rewards, values, discount, trace_lambda, lengths, bootstrap):
    """Equation 12.18, in Python floats."""
    out = []
    for (r, v), last in zip(pieces(lengths, rewards, values), bootstrap.tolist(), strict=True):
        targets, target, value = [], last, last
        for h in reversed(range(len(r))):
            target = r[h] + discount * ((1 - trace_lambda) * value + trace_lambda * target)
            value = v[h]
            targets.append(target)
        out += targets[::-1]
    return doubles(out)


def inputs(lengths, dtype=torch.float64):
    rewards, values = random_values(2, sum(lengths), dtype=dtype).unbind(0)
    return rewards, values, random_values(len(lengths), dtype=dtype, seed=1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_every_kernel_is_the_recursion(kernel, lengths, dtype, tolerance):
    rewards, values, bootstrap = inputs(lengths, dtype)
    out = td_lambda(rewards, values, 0.99, 0.9, offsets_of(lengths), bootstrap=bootstrap, backend=kernel)
    expected = recursion(rewards, values, 0.99, 0.9, lengths, bootstrap)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_is_the_weighted_mean_of_n_step_returns(backend):
    """Equation 12.3: (1−λ) Σ λ^{n−1} G_{h:h+n}, and the rest of the weight on the whole return."""
    rewards, values, bootstrap = inputs([5])
    r, v = rewards.tolist(), [*values.tolist(), bootstrap.item()]
    expected = []
    for h in range(5):
        n_step = [sum(0.9**k * r[h + k] for k in range(n)) + 0.9**n * v[h + n] for n in range(1, 5 - h + 1)]
        weights = [0.3 * 0.7 ** (n - 1) for n in range(1, 5 - h)] + [0.7 ** (5 - h - 1)]
        expected.append(sum(w * g for w, g in zip(weights, n_step, strict=True)))
    out = td_lambda(rewards, values, 0.9, 0.7, bootstrap=bootstrap, backend=backend)
    torch.testing.assert_close(out, doubles(expected), rtol=1e-12, atol=1e-12)


def test_is_advantage_plus_value(backend):
    rewards, values, bootstrap = inputs(SHORT)
    arguments = (rewards, values, 0.9, 0.8, offsets_of(SHORT))
    out = td_lambda(*arguments, bootstrap=bootstrap, backend=backend)
    torch.testing.assert_close(out, gae(*arguments, bootstrap=bootstrap) + values, rtol=1e-12, atol=1e-12)


def test_lambda_zero_is_the_one_step_target(backend):
    rewards, values, bootstrap = inputs([3])
    out = td_lambda(rewards, values, 0.9, 0.0, bootstrap=bootstrap, backend=backend)
    torch.testing.assert_close(out, rewards + 0.9 * torch.cat([values[1:], bootstrap]), rtol=1e-12, atol=1e-12)


def test_derivatives_and_the_first_value_has_none(backend):
    tensors = [x.requires_grad_() for x in inputs(SHORT)]

    def target(rewards, values, bootstrap):
        return td_lambda(rewards, values, 0.9, 0.8, offsets_of(SHORT), bootstrap=bootstrap, backend=backend)

    assert gradcheck(target, tensors, check_forward_ad=True)
    assert gradgradcheck(lambda *x: target(*x).sin(), tensors)
    (gradient,) = torch.autograd.grad(target(*tensors)[4], tensors[1])
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-15)


def test_bad_lambda():
    with pytest.raises(ValueError, match=r"trace_lambda must lie in \[0, 1\], got 2"):
        td_lambda(torch.zeros(4), torch.zeros(4), 0.9, 2.0)
