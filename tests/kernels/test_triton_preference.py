"""The preference loss in Triton against the op's reference in float64: around the sizes of blocks, in every dtype.

What all backends have in common is tested in tests/ops, in this one as well.
"""

import pytest
import torch

from parl_core.ops.preference_loss import preference_loss, reference
from tests.ops.ragged import offsets_of, random_values

triton_preference = pytest.importorskip("parl_core.kernels.triton_preference")

BLOCK = triton_preference._BLOCK // 4  # steps of one segment in a tile, in float32
LENGTHS = {
    "around_vectors": [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 0, 31, 33],
    "around_a_block": [BLOCK - 1, BLOCK, BLOCK + 1, 0, 2 * BLOCK, 2 * BLOCK + 1, BLOCK // 2],
    "many": [3, 0, 5] * 60,
}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def pairs(lengths, dtype, members=2):
    """Rewards (members, T) of the first and the second segments, and labels (M,), some of them ½."""
    first, second = (0.1 * random_values(members, sum(lengths), seed=seed).to(dtype) for seed in (0, 1))
    labels = torch.sigmoid(random_values(len(lengths), seed=2)).to(dtype)
    labels[::3] = labels[::3].round()
    labels[1::4] = 0.5
    return first, second, labels


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_ragged(device, poisoned_memory, lengths, dtype):
    first, second, labels = pairs(lengths, dtype)
    offsets = offsets_of(lengths), offsets_of(lengths[::-1])
    inputs = [tensor.to(device).requires_grad_() for tensor in (first, second, labels)]
    given = [tensor.to(device) for tensor in offsets]
    losses, correct = preference_loss(*inputs, *given, reduction="none", backend="triton")
    doubles = [tensor.double().requires_grad_() for tensor in (first, second, labels)]
    expected = reference(*doubles, *offsets)
    assert torch.equal(correct.cpu(), expected.correct)
    cotangent = random_values(2, len(lengths), seed=3).to(dtype)
    found = torch.autograd.grad(losses, inputs, cotangent.to(device))
    wanted = torch.autograd.grad(expected.loss, doubles, cotangent.double())
    for one, other in zip((losses.detach(), *found), (expected.loss.detach(), *wanted), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double().cpu(), other, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize("shape", [(5, 7), (2, 6, BLOCK), (3, 2, 2 * BLOCK + 4), (2, 0, 3), (3, 4, 0)])
def test_dense(device, poisoned_memory, shape):
    first, second = random_values(2, *shape, dtype=torch.float32).unbind(0)
    labels = torch.sigmoid(random_values(*shape[:-1], seed=2, dtype=torch.float32)).round()  # of each member
    inputs = [(tensor / 10).to(device).requires_grad_() for tensor in (first, second)]
    losses, correct = preference_loss(*inputs, labels.to(device), reduction="none", backend="triton")
    doubles = [(tensor / 10).double().requires_grad_() for tensor in (first, second)]
    expected = reference(*doubles, labels.double(), None, None)
    assert torch.equal(correct.cpu(), expected.correct)
    torch.testing.assert_close(losses.double().cpu(), expected.loss, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(losses.sum(), inputs)
    for one, other in zip(found, torch.autograd.grad(expected.loss.sum(), doubles), strict=True):
        torch.testing.assert_close(one.double().cpu(), other, rtol=1e-5, atol=1e-5)


def test_labels_keep_their_own_precision(device):
    """0.999 is 1 in bfloat16; the reference's loss at z = 10 is then .00005 in place of .01."""
    first, second = torch.zeros(1, 1, dtype=torch.bfloat16), torch.full((1, 1), 10.0, dtype=torch.bfloat16)
    labels = torch.tensor([0.999])
    loss, _ = preference_loss(first.to(device), second.to(device), labels.to(device), backend="triton")
    torch.testing.assert_close(loss.float().cpu(), torch.tensor(0.01 + 4.54e-5), rtol=5e-3, atol=0)


def test_what_offsets_hold_may_be_anything(device, monkeypatch):
    """Unchecked offsets must not lead out of the tensors."""
    num, count = 100, 20
    wild = torch.randint(-3 * num, 3 * num, (count + 1,), generator=torch.Generator().manual_seed(0)).to(device)
    slopes, rewards = torch.ones(1, count, device=device), torch.ones(1, num, device=device)
    frame = torch.full((num + 200,), float("nan"), device=device)
    triton_preference.preference_loss(rewards, rewards, slopes[0], wild, wild.flip(0))
    monkeypatch.setattr(torch, "empty_like", lambda like, **_: frame[100:-100].view(1, num))
    for offsets in (wild, wild.sort().values, wild.sort(descending=True).values):
        triton_preference.spread(slopes, rewards, offsets)
        assert frame[:100].isnan().all() and frame[-100:].isnan().all()


@pytest.mark.gpu
def test_captured_in_a_graph(device):
    lengths = LENGTHS["around_a_block"]
    first, second, labels = (tensor.to(device) for tensor in pairs(lengths, torch.float32))
    offsets = offsets_of(lengths).to(device)

    def loss_and_gradient():
        losses, logits, correct = triton_preference.preference_loss(first, second, labels, offsets, offsets)
        return losses, correct, triton_preference.spread(logits, first, offsets)

    loss_and_gradient()  # chooses configurations
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradient()
    first.mul_(2)
    graph.replay()
    for one, other in zip(captured, loss_and_gradient(), strict=True):
        assert torch.equal(one, other)
