"""What passes for a block of the whole loop in the benchmark of preference learning."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.peers import preference
from benchmarks.peers.preference_loop import PreferenceLoop
from parl_core.rl.replay import ReplayBuffer
from parl_core.rl.sac import SAC
from parl_core.training.presets import preset
from parl_core.training.trainer import TICK

pytest.importorskip("dm_control")

STEPS, BLOCKS = 4 * TICK, 2
MAKERS = {
    "parl-core": lambda: preference.parl_core(STEPS, BLOCKS),
    "parl-core, torch": lambda: preference.parl_core(STEPS, BLOCKS, "reference"),
    "eager torch": lambda: preference.eager_loop(STEPS, BLOCKS),
}
IN_ORDER = pytest.mark.parametrize("name", MAKERS)


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    def small(*names):
        config = preset(*names)
        sac, reward = replace(config.sac, hidden=(8, 8), batch_size=8), replace(config.reward, hidden=(8, 8, 8))
        return replace(config, sac=sac, reward=reward, updates_after_reset=2)

    monkeypatch.setattr(preference, "preset", small)
    monkeypatch.setattr(preference, "FIRST_LABELS", 20)


@IN_ORDER
def test_blocks_are_complete(name):
    run = MAKERS[name]()
    assert [run().tolist() for _ in range(BLOCKS)] == [preference.expected(STEPS, BLOCKS)] * BLOCKS


def test_networks_of_the_preset_have_as_many_parameters_as_counted():
    """Weights and biases by hand: inputs 24 and 6, hidden layers of 8, two critics, three members."""
    actor = 25 * 8 + 9 * 8 + 9 * 12
    critics = 2 * (31 * 8 + 9 * 8 + 9)
    rewards = 3 * (31 * 8 + 2 * 9 * 8 + 9)
    assert preference.num_parameters(preference.configuration(STEPS, BLOCKS)) == (actor, critics, rewards)


@pytest.mark.parametrize("name, method", [("parl-core, torch", "relabel"), ("eager torch", "fit")])
def test_stale_rewards_and_reward_networks_that_stay_are_seen(monkeypatch, name, method):
    run = MAKERS[name]()
    monkeypatch.setattr({"relabel": ReplayBuffer, "fit": PreferenceLoop}[method], method, lambda *_, **__: None)
    wrong = np.flatnonzero(run() != preference.expected(STEPS, BLOCKS))
    last = len(preference.expected(STEPS, BLOCKS)) - 1
    epochs, moved, relabelled = preference.COUNTS.index("epochs"), last - 1, last
    assert wrong.tolist() == {"relabel": [relabelled], "fit": [epochs, moved]}[method]


def test_updates_that_are_left_out_are_seen(monkeypatch):
    run = MAKERS["parl-core, torch"]()
    monkeypatch.setattr(SAC, "update", lambda agent, batch: {"critic_loss": batch.rewards.sum()})
    answer = run()
    assert answer[preference.COUNTS.index("updates")] == 0
    assert answer[-2] == 0
