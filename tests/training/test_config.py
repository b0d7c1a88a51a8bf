"""Configurations: presets as published, JSON round trip, one sentence for each mistake."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from parl_core.envs.tabular.problems.four_rooms import four_rooms_mdp
from parl_core.envs.tabular.problems.rand_mdp import DISCOUNT
from parl_core.errors import ConfigError, UnknownNameError
from parl_core.rl.sac import SACConfig
from parl_core.training.config import ImplicitConfig, RewardConfig, TrainConfig, from_dict, to_dict
from parl_core.training.presets import preset

TABULAR = ("tabular/four-rooms", "tabular/rand-mdp")
TASKS = ("dm_control/walker-walk", "metaworld/door-open", "metaworld/button-press")


@pytest.mark.parametrize("env", [*TASKS, *TABULAR, "dm_control/cheetah-run"])
@pytest.mark.parametrize("algorithm", ["oracle", "pebble", "a-parl"])
@pytest.mark.parametrize("name", ["cpu", "paper"])
def test_every_preset_is_valid_and_round_trips(env, algorithm, name):
    config = preset(env, algorithm, name)
    config.validate()
    assert (config.env, config.algorithm, config.preset) == (env, algorithm, name)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_paper_presets_hold_the_published_numbers():
    walker, door, button = (preset(env, "pebble", "paper") for env in TASKS)
    assert (walker.steps, walker.sac.hidden, walker.sac.batch_size) == (500_000, (1024, 1024), 1024)
    assert (walker.sac.actor_learning_rate, walker.sac.critic_learning_rate) == (5e-4, 5e-4)
    assert (walker.reward.session_interval, walker.reward.max_epochs) == (20_000, 50)
    assert (walker.reward.label_budget, walker.reward.labels_per_session) == (1000, 100)
    assert (door.steps, door.sac.hidden, door.sac.batch_size) == (1_000_000, (256, 256, 256), 512)
    assert (door.reward.session_interval, door.reward.max_epochs) == (5000, 10)
    assert (door.reward.label_budget, door.reward.labels_per_session) == (4000, 50)
    assert (button.reward.label_budget, button.reward.labels_per_session) == (20_000, 100)
    for config in (walker, door, button):
        assert config.first_session == 10_000
    oracle = preset("dm_control/walker-walk", "oracle", "paper")
    assert (oracle.steps, oracle.random_steps, oracle.pretrain_steps) == (1_000_000, 5000, 0)


@pytest.mark.parametrize("name", ["cpu", "paper"])
def test_tabular_presets_fit_their_problems(name):
    """The discount is the problem's; no episode that reaches a goal of Four-Rooms is too short for a segment."""
    four_rooms, rand = (preset(env, "a-parl", name) for env in TABULAR)
    assert four_rooms.sac.discount == four_rooms_mdp(0).discount
    assert rand.sac.discount == DISCOUNT
    steps, reached = 1, four_rooms_mdp(0).initial > 0.0
    ways = [four_rooms_mdp(goal).transitions.sum(axis=1) > 0.0 for goal in (0, 1)]
    while not any((reached & (way.sum(axis=1) == 0)).any() for way in ways):
        reached, steps = reached | (reached @ (ways[0] | ways[1])), steps + 1
    assert steps == 12  # eleven moves and the step at the goal
    assert four_rooms.reward.segment_length <= steps
    paper = preset("dm_control/walker-walk", "a-parl", "paper")
    assert (four_rooms.sac.hidden == paper.sac.hidden) == (name == "paper")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(algorithm="pebbles"), UnknownNameError, "did you mean pebble"),
        (dict(steps=0), ConfigError, "steps must be at least 1, got 0"),
        (dict(reward=RewardConfig(sampler="random")), UnknownNameError, "sampler"),
        (dict(reward=RewardConfig(label_budget=0)), ConfigError, "reward.label_budget"),
        (dict(seed=-1), ConfigError, "seed"),
        (dict(sac=SACConfig(hidden=(8, 0))), ConfigError, "sac.hidden must be at least 1, got 0"),
        (dict(sac=SACConfig(discount=2.0)), ConfigError, r"sac.discount must lie in \[0, 1\], got 2.0"),
        (dict(sac=SACConfig(initial_temperature=0.0)), ConfigError, "sac.initial_temperature .* above 0"),
        (dict(sac=SACConfig(target_update_interval=0)), ConfigError, "sac.target_update_interval"),
        (dict(sac=SACConfig(actor_learning_rate=float("nan"))), ConfigError, "sac.actor_learning_rate .* got nan"),
        (dict(reward=RewardConfig(learning_rate=-1.0)), ConfigError, "reward.learning_rate"),
        (dict(replay_capacity=1), ConfigError, "replay_capacity"),
        (dict(reward=RewardConfig(pool_episodes=1)), ConfigError, "reward.pool_episodes must be at least 2 for a-parl"),
        (dict(implicit=ImplicitConfig(recent_steps=10)), ConfigError, "implicit.recent_steps must hold a segment"),
        (dict(implicit=ImplicitConfig(on_policy_share=1.5)), ConfigError, "implicit.on_policy_share"),
    ],
)
def test_mistakes_are_named(change, error, words):
    with pytest.raises(error, match=words):
        replace(TrainConfig(), **change).validate()


def test_an_unknown_preset_is_named():
    with pytest.raises(UnknownNameError, match="did you mean paper"):
        preset("dm_control/walker-walk", "pebble", "papr")


def test_a_config_of_another_version_is_refused():
    data = to_dict(TrainConfig())
    with pytest.raises(ConfigError, match="no field colour"):
        from_dict({**data, "colour": 1})
    with pytest.raises(ConfigError, match=r"config.sac has no field x"):
        from_dict({**data, "sac": {"x": 1}})
    with pytest.raises(ConfigError, match=r"config.steps must be"):
        from_dict({**data, "steps": "many"})
    with pytest.raises(ConfigError, match=r"config.sac.hidden\[1\] must be"):
        from_dict({**data, "sac": {"hidden": [8, "a"]}})
    with pytest.raises(ConfigError, match=r"config.reward must be a table"):
        from_dict({**data, "reward": 3})
