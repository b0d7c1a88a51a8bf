"""Generalized advantage estimates against their definition as a double sum, in every kernel, and closed forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from parl_core.ops import discounted_returns, gae
from tests.ops.ragged import LENGTHS, cpu_backends, doubles, offsets_of, pieces, random_values

SHORT = [4, 0, 1, 6]


def double_sum(rewards, values, discount, gae_lambda, lengths, bootstrap):
    """A_h = Σ_k (discount λ)^k δ_{h+k}, term by term, in Python floats."""
    out = []
    for (r, v), last in zip(pieces(lengths, rewards, values), bootstrap.tolist(), strict=True):
        after = [*v[1:], last]
        errors = [r[h] + discount * after[h] - v[h] for h in range(len(r))]
        out += [sum((discount * gae_lambda) ** (k - h) * errors[k] for k in range(h, len(r))) for h in range(len(r))]
    return doubles(out)


def inputs(lengths, dtype=torch.float64, seed=0):
    """rewards (T,), values (T,), bootstrap (N,)."""
    rewards, values = random_values(2, sum(lengths), dtype=dtype, seed=seed).unbind(0)
    return rewards, values, random_values(len(lengths), dtype=dtype, seed=seed + 1)


def test_by_hand(kernel):
    """δ = (1 + 2 − 2, 3 + 5 − 4) and (1 + 1 − 6), with γ = ½ and λ = ½."""
    rewards, values = torch.tensor([1.0, 3.0, 1.0]), torch.tensor([2.0, 4.0, 6.0])
    offsets, bootstrap = torch.tensor([0, 2, 3]), torch.tensor([10.0, 2.0])
    out = gae(rewards, values, 0.5, 0.5, offsets, bootstrap=bootstrap, backend=kernel)
    assert out.tolist() == [1 + 0.25 * 4, 4, -4]


def test_terminated_is_a_bootstrap_of_zero(kernel):
    rewards, values, _ = inputs([3, 2])
    cut = gae(rewards, values, 0.9, 0.8, offsets_of([3, 2]), bootstrap=torch.zeros(2).double(), backend=kernel)
    assert torch.equal(gae(rewards, values, 0.9, 0.8, offsets_of([3, 2]), backend=kernel), cut)


# float32: about a hundred terms matter, each with a relative error of 6e-8 of a sum of order 10.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_every_kernel_is_the_double_sum(kernel, lengths, dtype, tolerance):
    rewards, values, bootstrap = inputs(lengths, dtype)
    out = gae(rewards, values, 0.99, 0.95, offsets_of(lengths), bootstrap=bootstrap, backend=kernel)
    assert out.dtype == dtype
    expected = double_sum(rewards, values, 0.99, 0.95, lengths, bootstrap)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@settings(deadline=None, max_examples=40, derandomize=True, database=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=6),
    discount=st.floats(0, 1),
    gae_lambda=st.floats(0, 1),
    seed=st.integers(0, 2**30),
)
def test_any_lengths(lengths, discount, gae_lambda, seed):
    rewards, values, bootstrap = inputs(lengths, seed=seed)
    expected = double_sum(rewards, values, discount, gae_lambda, lengths, bootstrap)
    for name in cpu_backends():
        out = gae(rewards, values, discount, gae_lambda, offsets_of(lengths), bootstrap=bootstrap, backend=name)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (5, 3), (2, 70), (70,)])
def test_rows_are_trajectories(kernel, shape):
    rewards, values = random_values(2, *shape).unbind(0)
    rows = shape[0] if len(shape) == 2 else 1
    bootstrap = random_values(rows)
    out = gae(rewards, values, 0.9, 0.8, bootstrap=bootstrap, backend=kernel)
    expected = double_sum(rewards.reshape(-1), values.reshape(-1), 0.9, 0.8, [shape[-1]] * rows, bootstrap)
    torch.testing.assert_close(out, expected.reshape(shape), rtol=1e-12, atol=1e-12)


def test_many_trajectories_on_threads(kernel):
    lengths = [0, 7, 9] * (40 if kernel == "triton" else 4200)  # the interpreter is slow
    rewards, values, bootstrap = inputs(lengths)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        out = gae(rewards, values, 0.9, 0.8, offsets_of(lengths), bootstrap=bootstrap, backend=kernel)
    finally:
        torch.set_num_threads(threads)
    expected = double_sum(rewards, values, 0.9, 0.8, lengths, bootstrap)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_lambda_one_is_return_minus_value(backend):
    """The bootstrap is a reward after the last step, discounted once more."""
    rewards, values, bootstrap = inputs(SHORT)
    offsets = offsets_of(SHORT)
    paid = rewards.clone()
    for n, length in enumerate(SHORT):
        if length:
            paid[offsets[n + 1] - 1] += 0.9 * bootstrap[n]
    out = gae(rewards, values, 0.9, 1.0, offsets, bootstrap=bootstrap, backend=backend)
    torch.testing.assert_close(out, discounted_returns(paid, 0.9, offsets) - values, rtol=1e-12, atol=1e-12)


def test_exact_values_leave_no_advantage(backend):
    """Where V is the return itself, every error vanishes, whatever λ."""
    rewards = random_values(11)
    values = discounted_returns(rewards, 0.9, offsets_of(SHORT))
    out = gae(rewards, values, 0.9, 0.7, offsets_of(SHORT), backend=backend)
    torch.testing.assert_close(out, torch.zeros_like(out), rtol=0, atol=1e-14)


def test_an_episode_that_ends_within_a_rollout(backend):
    """Two rows of four steps; the first terminates after its second step, the others are cut by the rollout's end."""
    rewards, values = random_values(2, 2, 4).unbind(0)
    last = random_values(2, seed=5)
    offsets, bootstrap = torch.tensor([0, 2, 4, 8]), torch.stack([torch.tensor(0.0).double(), last[0], last[1]])
    out = gae(rewards.reshape(-1), values.reshape(-1), 0.9, 0.8, offsets, bootstrap=bootstrap, backend=backend)
    # As rollout buffers write it: a mask cuts both the next value and the recurrence.
    ends = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]).double()
    advantage, expected = torch.zeros(2).double(), torch.empty(2, 4).double()
    for h in reversed(range(4)):
        after = values[:, h + 1] if h < 3 else last
        error = rewards[:, h] + 0.9 * after * (1 - ends[:, h]) - values[:, h]
        advantage = expected[:, h] = error + 0.9 * 0.8 * (1 - ends[:, h]) * advantage
    torch.testing.assert_close(out, expected.reshape(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("which", [0, 1])
def test_nan_stays_in_its_trajectory(kernel, which):
    steps = [torch.ones(110), torch.ones(110)]
    steps[which][60] = float("nan")
    out = gae(*steps, 0.9, 0.9, torch.tensor([0, 40, 75, 110]), backend=kernel)
    step = torch.arange(110)
    assert torch.equal(out.isnan(), (step >= 40) & (step <= 60))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    rewards, values, bootstrap = (x.to(dtype) for x in inputs([30]))
    out = gae(rewards, values, 0.99, 0.95, bootstrap=bootstrap)
    exact = gae(rewards.float(), values.float(), 0.99, 0.95, bootstrap=bootstrap.float())
    assert torch.equal(out, exact.to(dtype))
    followed = gae(rewards.clone().requires_grad_(), values, 0.99, 0.95, bootstrap=bootstrap)
    assert torch.equal(followed.detach(), exact.to(dtype))


class TestDerivatives:
    def test_gradcheck_twice(self, backend):
        tensors = [x.requires_grad_() for x in inputs(SHORT)]

        def estimate(rewards, values, bootstrap):
            return gae(rewards, values, 0.9, 0.8, offsets_of(SHORT), bootstrap=bootstrap, backend=backend)

        assert gradcheck(estimate, tensors, check_forward_ad=True)
        assert gradgradcheck(lambda *x: estimate(*x).sin(), tensors)

    def test_rows(self):
        tensors = [random_values(3, 4).requires_grad_(), random_values(3, 4, seed=1).requires_grad_()]
        tensors.append(random_values(3, seed=2).requires_grad_())
        assert gradcheck(lambda r, v, b: gae(r, v, 0.9, 0.8, bootstrap=b), tensors, check_forward_ad=True)

    @pytest.mark.parametrize("given", [True, False], ids=["offsets", "rows"])
    def test_followed_or_not_the_result_is_one(self, backend, given):
        """The fused kernel and the operations that autograd follows."""
        shape, offsets, number = ((11,), offsets_of(SHORT), 4) if given else ((3, 4), None, 3)
        rewards, values = random_values(2, *shape).unbind(0)
        bootstrap = random_values(number, seed=1)
        fused = gae(rewards, values, 0.9, 0.8, offsets, bootstrap=bootstrap, backend=backend)
        followed = gae(
            rewards.clone().requires_grad_(), values, 0.9, 0.8, offsets, bootstrap=bootstrap, backend=backend
        )
        assert followed.requires_grad and not fused.requires_grad
        torch.testing.assert_close(followed.detach(), fused, rtol=1e-12, atol=1e-12)

    def test_vmap_and_per_sample_gradients(self, backend):
        rewards, values = random_values(2, 3, 11).unbind(0)
        bootstrap, offsets = random_values(3, 4), offsets_of(SHORT)

        def loss(rewards, values, bootstrap):
            return gae(rewards, values, 0.9, 0.8, offsets, bootstrap=bootstrap, backend=backend).square().sum()

        gradients = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(rewards, values, bootstrap)
        for k in range(3):
            single = torch.func.grad(loss, argnums=(0, 1, 2))(rewards[k], values[k], bootstrap[k])
            for mapped, expected in zip(gradients, single, strict=True):
                torch.testing.assert_close(mapped[k], expected, rtol=1e-12, atol=1e-12)

    def test_compiled(self):
        torch._dynamo.reset()
        rewards, values, bootstrap = inputs(SHORT)
        values.requires_grad_()

        def estimate(rewards, values, bootstrap):
            return gae(rewards, values, 0.9, 0.8, offsets_of(SHORT), bootstrap=bootstrap).sin()

        out = torch.compile(estimate, fullgraph=True, backend="aot_eager")(rewards, values, bootstrap)
        expected = estimate(rewards, values, bootstrap)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        ours, theirs = (torch.autograd.grad(x.sum(), values)[0] for x in (out, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)

    def test_compiled_without_derivatives(self):
        torch._dynamo.reset()
        rewards, values, bootstrap = inputs(SHORT)
        offsets = offsets_of(SHORT)
        compiled = torch.compile(gae, fullgraph=True, backend="aot_eager")
        out = compiled(rewards, values, 0.9, 0.8, offsets, bootstrap=bootstrap)
        expected = gae(rewards, values, 0.9, 0.8, offsets, bootstrap=bootstrap)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


FOUR = torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"values": [1.0]}, TypeError, "values must be a Tensor, got list"),
        ({"values": FOUR.double()}, TypeError, "values must have the dtype of rewards, torch.float32, got"),
        ({"values": FOUR[:3]}, ValueError, r"values must have the shape of rewards, \(4,\), got \(3,\)"),
        ({"rewards": FOUR.long()}, TypeError, "rewards must be of a floating-point dtype, got torch.int64"),
        ({"discount": 1.01}, ValueError, r"discount must lie in \[0, 1\], got 1.01"),
        ({"gae_lambda": -0.1}, ValueError, r"gae_lambda must lie in \[0, 1\], got -0.1"),
        ({"gae_lambda": torch.tensor(0.9)}, TypeError, "gae_lambda must be a number, got a Tensor"),
        ({"bootstrap": 0.0}, TypeError, "bootstrap must be a Tensor, got float"),
        ({"bootstrap": torch.zeros(1).double()}, TypeError, "bootstrap must have the dtype of rewards"),
        ({"bootstrap": torch.zeros(2)}, ValueError, r"bootstrap must be of shape \(N,\) = \(1,\).*got \(2,\)"),
        (
            {"bootstrap": torch.zeros(1), "offsets": torch.tensor([0, 1, 4])},
            ValueError,
            r"bootstrap must be of shape \(N,\) = \(2,\)",
        ),
        ({"offsets": torch.tensor([0, 3])}, ValueError, "offsets must end at the number of steps, 4, got 3"),
    ],
)
@pytest.mark.parametrize("followed", [False, True])
def test_bad_arguments(arguments, error, message, followed):
    arguments = {"rewards": FOUR.clone(), "values": FOUR, "discount": 0.9, "gae_lambda": 0.8, **arguments}
    if followed and arguments["rewards"].is_floating_point():
        arguments["rewards"].requires_grad_()
    with pytest.raises(error, match=message):
        gae(**arguments)


def test_native_kernel_checks_its_tensors():
    native = pytest.importorskip("parl_core._native")

    def estimate(values=FOUR, bootstrap=None, out=None):
        native.lambda_returns(FOUR, values, bootstrap, None, torch.empty(4) if out is None else out, 0.9, 0.8, False, 1)

    with pytest.raises(TypeError, match="values must have the dtype of rewards"):
        estimate(values=FOUR.double())
    with pytest.raises(ValueError, match="values must have as many elements as rewards, 4, got 3"):
        estimate(values=FOUR[:3])
    with pytest.raises(TypeError, match="bootstrap must have the dtype of rewards"):
        estimate(bootstrap=torch.zeros(1).double())
    with pytest.raises(ValueError, match="bootstrap must have one element for each of the 1 trajectories, got 2"):
        estimate(bootstrap=torch.zeros(2))
    with pytest.raises(ValueError, match="out must have as many elements as rewards, 4, got 5"):
        estimate(out=torch.empty(5))
