"""The preference loss against its definition in Python floats, and its derivatives against finite differences."""

import math
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from parl_core.ops import available_backends, preference_loss
from parl_core.ops.preference_loss import reference
from tests.ops.ragged import skip_unless_here

LENGTHS = {"one": [3], "ragged": [5, 0, 17, 1], "long": [63, 1000, 64], "empty": [0, 0], "none": []}


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request):
    skip_unless_here(request.param)
    return request.param


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def by_definition(first: list[list[float]], second: list[list[float]], labels: list[float]) -> tuple[list[float], int]:
    """Each pair's cross-entropy from the probabilities themselves, for moderate logits; and how many are in order."""
    losses, correct = [], 0
    for one, other, label in zip(first, second, labels, strict=True):
        logit = math.fsum(other) - math.fsum(one)
        probability = 1.0 / (1.0 + math.exp(-logit))
        losses.append(-label * math.log(probability) - (1.0 - label) * math.log(1.0 - probability))
        correct += label != 0.5 and logit != 0 and (logit > 0) == (label > 0.5)
    return losses, correct


def random_pairs(lengths: list[int], members: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards (members, T) of two sides of the same lengths in reverse order, and labels (M,), some of them ½."""
    steps = sum(lengths)
    first, second = 0.1 * normal(members, steps, seed=seed, dtype=dtype), 0.1 * normal(members, steps, seed=seed + 1)
    labels = torch.rand(len(lengths), generator=torch.Generator().manual_seed(seed + 2), dtype=dtype)
    labels[::3] = labels[::3].round()
    labels[1::4] = 0.5
    return first, second.to(dtype), labels


def cut(values: Tensor, lengths: list[int]) -> list[list[float]]:
    return [part.tolist() for part in values.split(lengths)] if lengths else []


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_every_backend_is_the_definition(backend, isa, lengths, dtype, tolerance):
    first, second, labels = random_pairs(lengths, 3, dtype)
    offsets = offsets_of(lengths), offsets_of(lengths[::-1])
    result = preference_loss(first, second, labels, *offsets, reduction="none", backend=backend)
    assert result.loss.shape == (3, len(lengths)) and result.loss.dtype == dtype
    for k in range(3):
        losses, correct = by_definition(cut(first[k], lengths), cut(second[k], lengths[::-1]), labels.tolist())
        expected = torch.tensor(losses, dtype=torch.float64)
        torch.testing.assert_close(result.loss[k].double(), expected, rtol=tolerance, atol=tolerance)
        assert result.correct[k] == correct


@settings(deadline=None, max_examples=40, derandomize=True, database=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=20),
    members=st.integers(1, 3),
    own_labels=st.booleans(),
    seed=st.integers(0, 2**31 - 9),
)
def test_any_lengths(lengths, members, own_labels, seed):
    first, second, labels = random_pairs(lengths, members, torch.float64, seed)
    if own_labels:
        labels = torch.stack([labels.roll(k) for k in range(members)])
    arguments = first, second, labels, offsets_of(lengths), offsets_of(lengths[::-1])
    expected = reference(*arguments)
    if "cpp" in available_backends():
        found = preference_loss(*arguments, reduction="none", backend="cpp")
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=1e-12)
        assert torch.equal(found.correct, expected.correct)


def test_dense_by_hand(backend):
    """Returns 3 and 1, so the logit is −2; 0 and 0; 0 and 3: in order, a tie, out of order."""
    first = torch.tensor([[1.0, 2.0], [1.0, -1.0], [0.0, 0.0]])
    second = torch.tensor([[0.5, 0.5], [0.0, 0.0], [1.0, 2.0]])
    labels = torch.tensor([0.0, 1.0, 0.25])
    loss, correct = preference_loss(first, second, labels, reduction="none", backend=backend)
    softplus = [math.log1p(math.exp(-2)), math.log(2), 3 + math.log1p(math.exp(-3)) - 0.25 * 3]
    torch.testing.assert_close(loss, torch.tensor(softplus))
    assert correct.shape == () and correct == 1
    mean = preference_loss(first, second, labels, backend=backend)
    torch.testing.assert_close(mean.loss, loss.mean())


def test_strided_views_of_pairs_side_by_side(backend):
    rewards = normal(3, 8, 2, 5).requires_grad_()
    first, second = rewards.unbind(2)
    labels = torch.rand(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (found,) = torch.autograd.grad(preference_loss(first, second, labels, backend=backend).loss.sum(), rewards)
    logits = second.sum(-1) - first.sum(-1)
    slope = (torch.sigmoid(logits) - labels).detach() / 8
    expected = torch.stack((-slope, slope), 2).unsqueeze(-1).expand_as(rewards)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_logits_stay_finite_and_exact(backend, dtype):
    sums = torch.tensor([1e4, -1e4, 80.0, 30.0], dtype=dtype)
    labels = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=dtype)
    first = torch.zeros(4, 1, dtype=dtype)
    second = sums.unsqueeze(1).clone().requires_grad_()
    loss, _ = preference_loss(first, second, labels, reduction="none", backend=backend)
    expected = torch.tensor([0.0, 1e4, math.exp(-80.0), 30.0 + math.exp(-30.0)], dtype=torch.float64)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), second)
    assert torch.isfinite(gradient).all()
    assert gradient[1] == -1


def test_nan_stays_in_its_pair(backend):
    first, second = torch.zeros(3, 2), torch.ones(3, 2)
    first[1, 0] = torch.nan
    loss, correct = preference_loss(first, second, torch.ones(3), reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, True, False]
    assert correct == 2


class TestDerivatives:
    first_lengths, second_lengths = [4, 0, 3], [1, 2, 2]

    @pytest.fixture
    def tensors(self):
        labels = torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64)
        return normal(2, 7).requires_grad_(), normal(2, 5, seed=1).requires_grad_(), labels.requires_grad_()

    def loss(self, backend, reduction="mean"):
        offsets = offsets_of(self.first_lengths), offsets_of(self.second_lengths)
        return lambda f, s, y: preference_loss(f, s, y, *offsets, reduction=reduction, backend=backend).loss

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_gradcheck_twice(self, backend, tensors, reduction):
        loss = self.loss(backend, reduction)
        assert gradcheck(loss, tensors, check_forward_ad=True)
        assert gradgradcheck(loss, tensors)

    def test_second_order_is_right(self, backend, tensors):
        """Canary: with z = 1ᵀs − 1ᵀf the Hessian in (f, s) of one pair is σ(z)σ(−z) (−1, 1)(−1, 1)ᵀ."""
        first, second = (t[0, :3].detach().reshape(1, 3) for t in tensors[:2])
        label = torch.tensor([0.3], dtype=torch.float64)

        def loss(both):
            return preference_loss(both[:3].view(1, 3), both[3:].view(1, 3), label, backend=backend).loss

        both = torch.cat((first, second), 1).squeeze(0)
        z = second.sum() - first.sum()
        signs = torch.tensor([-1.0] * 3 + [1.0] * 3, dtype=torch.float64)
        expected = torch.sigmoid(z) * torch.sigmoid(-z) * torch.outer(signs, signs)
        for hessian in (torch.autograd.functional.hessian(loss, both), torch.func.hessian(loss)(both)):
            torch.testing.assert_close(cast(Tensor, hessian), expected, rtol=1e-10, atol=1e-12)

    def test_func_transforms_agree_with_autograd(self, backend, tensors):
        loss = self.loss(backend)
        detached = tuple(t.detach() for t in tensors)
        expected = torch.autograd.grad(loss(*tensors).sum(), tensors)
        found = torch.func.grad(lambda *t: loss(*t).sum(), argnums=(0, 1, 2))(*detached)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        _, along = cast(Any, torch.func.jvp(loss, detached, detached))
        directional = torch.autograd.functional.jvp(loss, detached, detached)[1]
        torch.testing.assert_close(along, directional, rtol=1e-12, atol=1e-12)
        batch = torch.stack([detached[0], 2 * detached[0]])
        mapped = torch.func.vmap(lambda f: loss(f, detached[1], detached[2]))(batch)
        torch.testing.assert_close(mapped[1], loss(batch[1], detached[1], detached[2]), rtol=1e-12, atol=1e-12)

    def test_compiled(self, backend, tensors):
        torch._dynamo.reset()
        loss = self.loss(backend)
        compiled = torch.compile(lambda *t: loss(*t), fullgraph=True, backend="aot_eager")
        expected, found = loss(*tensors), compiled(*tensors)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        for one, other in zip(
            torch.autograd.grad(found.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_write_every_element(isa, dtype):
    native = pytest.importorskip("parl_core._native")
    lengths = [3, 0, 41, 1, 16]
    steps = sum(lengths)
    first, second, labels = random_pairs(lengths, 2, dtype)
    losses, logits = (torch.full((2, 5), torch.nan, dtype=dtype) for _ in range(2))
    correct = torch.full((2,), -1)
    offsets = offsets_of(lengths)
    native.preference_loss(first, offsets, second, offsets, labels, 2, losses, logits, correct)
    expected = reference(first, second, labels, offsets, offsets)
    torch.testing.assert_close(losses, expected.loss, rtol=1e-5, atol=1e-5)
    assert torch.equal(correct, expected.correct)
    out = torch.full((2, steps), torch.nan, dtype=dtype)
    native.spread_over_segments(logits, -2.0, offsets, 2, out)
    assert torch.equal(out, -2 * logits.repeat_interleave(offsets.diff(), -1))


PAIRS, LABELS = torch.zeros(3, 4), torch.ones(3)
TWELVE = torch.zeros(12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: preference_loss(cast(Any, [1.0]), PAIRS, LABELS), TypeError, "first must be a Tensor, got list"),
        (lambda: preference_loss(PAIRS, PAIRS.long(), LABELS), TypeError, "second must be of a floating-point dtype"),
        (lambda: preference_loss(PAIRS, PAIRS.double(), LABELS), TypeError, "second must have the dtype of first"),
        (lambda: preference_loss(PAIRS, PAIRS, LABELS[:2]), ValueError, r"first must be of shape \(M, L\).*M = 2"),
        (lambda: preference_loss(PAIRS, TWELVE, LABELS), ValueError, r"second must be of shape .* second_offsets"),
        (lambda: preference_loss(PAIRS, PAIRS[None], LABELS), ValueError, "as many members as first"),
        (lambda: preference_loss(PAIRS, PAIRS, LABELS[None]), ValueError, "as many members as the rewards"),
        (lambda: preference_loss(PAIRS, PAIRS, LABELS, reduction="sum"), ValueError, "reduction must be .* got 'sum'"),
        (
            lambda: preference_loss(TWELVE, PAIRS, LABELS, torch.tensor([0, 12])),
            ValueError,
            r"first_offsets must be int64 of shape \(M\+1,\) = \(4,\)",
        ),
        (
            lambda: preference_loss(TWELVE, PAIRS, LABELS, torch.tensor([0, 4, 8, 11])),
            ValueError,
            "offsets must end at the number of steps, 12, got 11",
        ),
        (
            lambda: preference_loss(PAIRS, PAIRS.to("meta"), LABELS),
            ValueError,
            "second must be on the device of first, cpu, got meta",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_native_module_checks_its_tensors():
    native = pytest.importorskip("parl_core._native")
    good = {
        "first": torch.zeros(2, 6), "first_offsets": None, "second": torch.zeros(2, 6), "second_offsets": None,
        "labels": torch.ones(3), "members": 2, "losses": torch.empty(2, 3), "logits": torch.empty(2, 3),
        "correct": torch.empty(2, dtype=torch.int64),
    }  # fmt: skip
    native.preference_loss(**good)
    for changes, error, message in [
        ({"second": torch.zeros(2, 6).double()}, TypeError, "second must be of dtype float32, got float64"),
        ({"first": torch.zeros(2, 12)[:, ::2]}, ValueError, "first must be contiguous"),
        ({"labels": torch.ones(4)}, ValueError, "labels must have 6 elements, got 4"),
        ({"logits": torch.empty(5)}, ValueError, "logits must have 6 elements, got 5"),
        ({"first": torch.zeros(2, 5)}, ValueError, "first_offsets must be given"),
        ({"second_offsets": torch.tensor([0, 4, 2, 6])}, ValueError, "second_offsets must not decrease"),
        (
            {"second_offsets": torch.tensor([0, 1, 2, 5])},
            ValueError,
            "second_offsets must end at the number of steps, 6, got 5",
        ),
        ({"members": 0}, ValueError, "for each of 0 members"),
        ({"correct": torch.empty(2)}, TypeError, "correct must be of dtype int64, got float32"),
    ]:
        with pytest.raises(error, match=message):
            native.preference_loss(**(good | changes))


@pytest.mark.parametrize("ragged", [False, True])
def test_batched_cotangents(ragged):
    offsets = torch.tensor([0, 1, 3, 6]) if ragged else None
    shape = (2, 6) if ragged else (2, 3, 2)
    first, second = (torch.randn(shape, dtype=torch.float64).requires_grad_() for _ in range(2))
    labels = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    loss = preference_loss(first, second, labels, offsets, offsets, reduction="none").loss
    wanted = [first, second, labels]
    cotangents = torch.randn(4, 2, 3, dtype=torch.float64)
    found = torch.autograd.grad(loss, wanted, cotangents, is_grads_batched=True, retain_graph=True)
    for number, cotangent in enumerate(cotangents):
        for part, alone in zip(found, torch.autograd.grad(loss, wanted, cotangent, retain_graph=True), strict=True):
            torch.testing.assert_close(part[number], alone)
