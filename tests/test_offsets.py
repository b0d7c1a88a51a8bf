"""Offsets on an accelerator: looked at once, then known, until they change or a CUDA graph is captured."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import parl_core.offsets as module
from parl_core import Fisher, LogProbHessian, ScoreHessian, Trajectories, linearize, ops, policies
from parl_core.offsets import check_offset_values, remember_offsets
from tests.host_reads import HostReadError, no_host_reads


@pytest.fixture
def accelerator(monkeypatch):
    """Tensors on the CPU are taken for ones on an accelerator, where a read has its price."""
    monkeypatch.setattr(module, "reads_are_free", lambda device: False)


def cuts(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


def test_on_the_cpu_every_call_looks():
    offsets = cuts(0, 2, 5)
    check_offset_values(offsets, 5)
    with no_host_reads(), pytest.raises(HostReadError):
        check_offset_values(offsets, 5)


@pytest.mark.usefixtures("accelerator")
class TestOnAnAccelerator:
    def test_a_tensor_is_looked_at_once(self):
        offsets = cuts(0, 2, 5)
        check_offset_values(offsets, 5)
        with no_host_reads():
            check_offset_values(offsets, 5)
            with pytest.raises(HostReadError):
                check_offset_values(cuts(0, 2, 5), 5)  # another tensor is another matter

    def test_a_change_is_noticed(self):
        offsets = cuts(0, 2, 5)
        check_offset_values(offsets, 5)
        offsets[1] = 7
        with pytest.raises(ValueError, match=r"must not decrease, got offsets\[2\] = 5 after offsets\[1\] = 7"):
            check_offset_values(offsets, 5)
        offsets[1] = 3
        check_offset_values(offsets, 5)

    def test_another_number_of_steps_is_another_question(self):
        offsets = cuts(0, 2, 5)
        check_offset_values(offsets, 5)
        with pytest.raises(ValueError, match="must end at the number of steps, 6, got 5"):
            check_offset_values(offsets, 6)

    def test_wrong_ones_are_not_remembered(self):
        offsets = cuts(1, 2, 5)
        for _ in range(2):
            with pytest.raises(ValueError, match="must start at 0, got 1"):
                check_offset_values(offsets, 5)

    def test_nothing_is_kept_alive(self):
        before = len(module._FOUND_RIGHT)
        offsets = cuts(0, 2, 5)
        check_offset_values(offsets, 5)
        assert len(module._FOUND_RIGHT) == before + 1
        del offsets
        gc.collect()
        assert len(module._FOUND_RIGHT) == before

    def test_tensors_that_count_no_changes_are_looked_at_every_time(self):
        with torch.inference_mode():
            offsets = cuts(0, 2, 5)
            remember_offsets(offsets, 5)
            check_offset_values(offsets, 5)
            offsets[1] = 7
            with pytest.raises(ValueError, match="must not decrease"):
                check_offset_values(offsets, 5)

    def test_while_a_graph_is_captured_the_device_looks(self, monkeypatch):
        known, new, wrong = cuts(0, 2, 5), cuts(0, 2, 5), cuts(0, 6, 5)
        check_offset_values(known, 5)
        monkeypatch.setattr(module, "is_capturing", lambda: True)
        asserted: list[Tensor] = []
        monkeypatch.setattr(torch, "_assert_async", lambda condition, message: asserted.append(condition))
        with no_host_reads():
            for offsets in (known, new, wrong):
                check_offset_values(offsets, 5)
            for offsets, steps in ((cuts(1, 5), 5), (cuts(0, 4), 5), (cuts(0), 0)):
                check_offset_values(offsets, steps)
        assert [condition.item() for condition in asserted] == [True, False, False, False, True]
        assert all(condition.shape == () for condition in asserted)

    def test_trajectories_are_known_from_their_making(self):
        data = Trajectories(torch.randn(5, 2), torch.randn(5, 1), cuts(0, 2, 5))
        chosen = data.select(torch.tensor([1, 0, 1]))
        with no_host_reads():
            check_offset_values(data.offsets, 5)
            check_offset_values(chosen.offsets, 8)

    def test_an_operator_of_known_trajectories_is_made_without_a_look(self):
        torch.manual_seed(0)
        policy, rewards = policies.GaussianPolicy(2, 1, (4,)), torch.randn(5)
        data = Trajectories(torch.randn(5, 2), torch.randn(5, 1), cuts(0, 2, 5))
        linearization = linearize(policy, data)
        specs = [
            ScoreHessian(baseline="mean", temperature=0.1),
            ScoreHessian(baseline=torch.ones(3)),
            LogProbHessian(baseline="mean"),
            Fisher(0.1),
        ]
        for spec in specs:
            vector = torch.ones(linearization.num_params)
            expected = spec.operator(linearization, rewards, 0.9)(vector)
            with no_host_reads():
                operator = spec.operator(linearization, rewards, 0.9)
            torch.testing.assert_close(operator(vector), expected)

    @pytest.mark.parametrize("backend", [None, "cpp", "numba"])
    def test_a_batch_of_recurrences_asks_about_its_own_trajectories_alone(self, backend, monkeypatch):
        if backend not in (None, *ops.available_backends()):
            pytest.skip(f"backend {backend} is unavailable")
        offsets, read = cuts(0, 2, 5), []
        monkeypatch.setattr(module, "_read_offsets", lambda offsets, num_steps: read.append(num_steps))
        many = torch.func.vmap(lambda rewards: ops.prefix_sum(rewards, offsets, backend=backend))
        for _ in range(2):
            many(torch.ones(3, 5))
        assert read == [5]


def test_fake_offsets_have_no_numbers_to_check():
    with FakeTensorMode():
        offsets = torch.empty(3, dtype=torch.int64, device="cuda")
        check_offset_values(offsets, 5)


@pytest.mark.gpu
def test_on_a_gpu_a_second_call_does_not_wait():
    offsets = torch.tensor([0, 2, 5], device="cuda")
    rewards = torch.ones(5, device="cuda")
    expected = ops.discounted_returns(rewards, 0.5, offsets)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = ops.discounted_returns(rewards, 0.5, offsets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, expected)
