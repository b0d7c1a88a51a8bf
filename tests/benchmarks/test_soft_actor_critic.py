"""What passes for training in the benchmark of soft actor-critic."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import WrongAnswer
from benchmarks.peers.soft_actor_critic import num_parameters, parl_core
from parl_core.rl.sac import SAC
from parl_core.training.trainer import TICK

pytest.importorskip("dm_control")

WIDTH = 8
COUNTS = [TICK, TICK, *num_parameters(WIDTH)]


def count_only(self, batch, *, backend=None):
    """An update that does nothing, but in the reference."""
    if backend == "reference":
        return self._reference_update(batch)
    self.num_updates += 1
    return dict.fromkeys(("critic_loss", "actor_loss", "entropy", "temperature"), torch.tensor(0.0))


def test_training_moves_all_networks():
    assert parl_core(WIDTH, TICK)().tolist() == [*COUNTS, 1, 1]


def test_updates_that_do_nothing_are_wrong(monkeypatch):
    monkeypatch.setattr(SAC, "update", count_only)
    with pytest.raises(WrongAnswer, match=r"its error is 1\.0e\+00"):
        parl_core(WIDTH, TICK)
    assert parl_core(WIDTH, TICK, "cpp")().tolist() == [*COUNTS, 1, 0]


def test_targets_that_stay_have_not_moved(monkeypatch):
    run = parl_core(WIDTH, TICK)
    monkeypatch.setattr(SAC, "update", update_all_but_targets)
    assert run().tolist() == [*COUNTS, 1, 0]


def update_all_but_targets(self, batch, *, backend=None):
    kept = [param.clone() for param in self.target_critic.parameters()]
    logs = self._reference_update(batch)
    for param, old in zip(self.target_critic.parameters(), kept, strict=True):
        param.data.copy_(old)
    return logs
