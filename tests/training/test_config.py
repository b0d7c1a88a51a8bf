"""Configurations: presets as published, JSON round trip, one sentence for each mistake."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from parl_core.envs.tabular.problems.four_rooms import four_rooms_mdp
from parl_core.envs.tabular.problems.rand_mdp import DISCOUNT
from parl_core.errors import ConfigError, UnknownNameError
from parl_core.rl.sac import SACConfig
from parl_core.training.config import ALGORITHMS, ImplicitConfig, RewardConfig, TrainConfig, flatten, from_dict, to_dict
from parl_core.training.presets import preset

TABULAR = ("tabular/four-rooms", "tabular/rand-mdp")
TASKS = ("dm_control/walker-walk", "metaworld/door-open", "metaworld/button-press")


@pytest.mark.parametrize("env", [*TASKS, *TABULAR, "dm_control/cheetah-run"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", ["cpu", "paper"])
def test_every_preset_is_valid_and_round_trips(env, algorithm, name):
    config = preset(env, algorithm, name)
    config.validate()
    assert (config.env, config.algorithm, config.preset) == (env, algorithm, name)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


PUBLISHED = {
    "random_steps": 1000,
    "pretrain_steps": 9000,
    "updates_after_reset": 100,
    "update_interval": 1,
    "replay_capacity": 1_000_000,
    "eval_interval": 10_000,
    "eval_episodes": 10,
    "num_envs": 1,
    "bpref_compat": False,
    "sac.discount": 0.99,
    "sac.polyak": 0.005,
    "sac.target_update_interval": 2,
    "sac.initial_temperature": 0.1,
    "sac.temperature_learning_rate": 1e-4,
    "reward.hidden": (256, 256, 256),
    "reward.members": 3,
    "reward.learning_rate": 3e-4,
    "reward.batch_size": 128,
    "reward.segment_length": 50,
    "reward.accuracy_target": 0.97,
    "reward.sampler": "disagreement",
    "reward.schedule": "constant",
    "reward.pool_episodes": 100,
    "surf.crop": 5,
    "surf.threshold": 0.99,
    "surf.weight": 1.0,
    "surf.unlabelled_batch_ratio": 4,
    "surf.pool_capacity": 500_000,
    "teacher.beta": -1.0,
    "teacher.discount": 1.0,
    "teacher.mistake": 0.0,
    "teacher.skip": 0.0,
    "teacher.equal": 0.0,
}
"""Of PEBBLE, B-Pref and SURF on every task."""
WALKER = {
    "steps": 500_000,
    "sac.hidden": (1024, 1024),
    "sac.batch_size": 1024,
    "sac.actor_learning_rate": 5e-4,
    "sac.critic_learning_rate": 5e-4,
    "reward.session_interval": 20_000,
    "reward.max_epochs": 50,
    "reward.label_budget": 1000,
    "reward.labels_per_session": 100,
}
DOOR = {
    "steps": 1_000_000,
    "sac.hidden": (256, 256, 256),
    "sac.batch_size": 512,
    "sac.actor_learning_rate": 3e-4,
    "sac.critic_learning_rate": 3e-4,
    "reward.session_interval": 5000,
    "reward.max_epochs": 10,
    "reward.label_budget": 4000,
    "reward.labels_per_session": 50,
}
BUTTON = {**DOOR, "reward.label_budget": 20_000, "reward.labels_per_session": 100}


@pytest.mark.parametrize(("env", "numbers"), zip(TASKS, (WALKER, DOOR, BUTTON), strict=True))
def test_paper_presets_hold_the_published_numbers(env, numbers):
    epochs, ratio = (1000, 100) if numbers is WALKER else (20, 10)
    surf = {"reward.max_epochs": epochs, "surf.inv_label_ratio": ratio}
    oracle = {"random_steps": 5000, "pretrain_steps": 0, "steps": 1_000_000}
    for algorithm, changes in {"pebble": {}, "surf": surf, "a-parl": {}, "oracle": oracle}.items():
        config = flatten(to_dict(preset(env, algorithm, "paper")))
        expected = {**PUBLISHED, **numbers, **changes}
        assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("env", "labels", "session"),
    [
        *[(TASKS[0], *pair) for pair in ((100, 10), (500, 50), (1000, 100))],
        *[(TASKS[1], *pair) for pair in ((1000, 10), (4000, 50))],
        *[(TASKS[2], *pair) for pair in ((10_000, 50), (20_000, 100))],
    ],
)
def test_a_published_budget_brings_its_session_size(env, labels, session):
    for algorithm in ("pebble", "surf", "a-parl"):
        config = preset(env, algorithm, "paper", labels)
        reward = replace(config.reward, label_budget=labels, labels_per_session=session)
        assert config == replace(preset(env, algorithm, "paper"), reward=reward)


def test_a_budget_that_nobody_published_is_refused():
    with pytest.raises(ConfigError, match="paper on dm_control/walker-walk 100, 500, 1000, got 200; "):
        preset(TASKS[0], "pebble", "paper", 200)
    for env, name in ((TASKS[0], "cpu"), ("dm_control/cheetah-run", "paper"), (TABULAR[0], "paper")):
        with pytest.raises(ConfigError, match=f"preset {name} on {env} nothing, got 1000"):
            preset(env, "pebble", name, 1000)


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
