"""The numbers a run starts from, per task: `paper` as published, `cpu` sized for two cores."""

from __future__ import annotations

from dataclasses import replace

from ..envs.tabular.problems.rand_mdp import DISCOUNT as RAND_MDP_DISCOUNT
from ..errors import ConfigError, unknown_name
from ..rl.sac import SACConfig
from .config import RewardConfig, TrainConfig

PRESETS = ("cpu", "paper")
PUBLISHED_LABELS = {
    "dm_control/walker-walk": {100: 10, 500: 50, 1000: 100},
    "metaworld/door-open": {1000: 10, 4000: 50},
    "metaworld/button-press": {10_000: 50, 20_000: 100},
}
"""Labels in all, and in one session, of the published runs; the last is what `paper` takes unless told otherwise."""


def preset(env: str, algorithm: str, name: str, labels: int | None = None) -> TrainConfig:
    """The configuration of `name` for an environment; one without published numbers gets those of its family.

    `paper` holds the published settings of PEBBLE on that task (Lee et al. 2021; Park et al. 2022, "SURF"). `cpu` has
    smaller networks and batches and fewer steps. On the tabular tasks PEBBLE is not published: there `paper` has its
    networks and batches on DM Control, with the one schedule of the tabular tasks.

    Args:
        env, algorithm: what is trained, and how.
        name: cpu or paper.
        labels: one of the published label budgets of `env`, which brings the session size published with it; only for
            `paper`. None: the largest.

    Raises:
        UnknownNameError: no such preset.
        ConfigError: nobody has published a run with so many labels.
    """
    family = env.partition("/")[0]
    if name == "paper":
        config = _paper_metaworld() if family == "metaworld" else _paper_dm_control()
    elif name == "cpu":
        config = {"metaworld": _cpu_metaworld, "tabular": _cpu_tabular}.get(family, _cpu_dm_control)()
    else:
        raise unknown_name("preset", name, PRESETS)
    if family == "tabular":
        config = _tabular(config, env)
    published = PUBLISHED_LABELS.get(env, {}) if name == "paper" else {}
    if labels is not None and labels not in published:
        known = ", ".join(map(str, published)) or "nothing"
        raise ConfigError(
            f"labels must be a published label budget, for preset {name} on {env} {known}, got {labels}; "
            "reward.label_budget and reward.labels_per_session take any"
        )
    if published:
        budget = max(published) if labels is None else labels
        reward = replace(config.reward, label_budget=budget, labels_per_session=published[budget])
        config = replace(config, reward=reward)
    if algorithm == "surf":
        config = _surf(config, family, name)
    if algorithm == "oracle":
        config = replace(config, random_steps=5000 if name == "paper" else config.random_steps, pretrain_steps=0)
        if env == "dm_control/walker-walk" and name == "paper":
            config = replace(config, steps=1_000_000)
    return replace(config, env=env, algorithm=algorithm, preset=name)


def _sac(hidden: tuple[int, ...], batch_size: int, learning_rate: float) -> SACConfig:
    return SACConfig(
        hidden=hidden,
        batch_size=batch_size,
        actor_learning_rate=learning_rate,
        critic_learning_rate=learning_rate,
    )


def _paper_dm_control() -> TrainConfig:
    return TrainConfig(
        steps=500_000,
        sac=_sac((1024, 1024), 1024, 5e-4),
        reward=RewardConfig(label_budget=1000, labels_per_session=100, session_interval=20_000, max_epochs=50),
    )


def _paper_metaworld() -> TrainConfig:
    return TrainConfig(
        steps=1_000_000,
        sac=_sac((256, 256, 256), 512, 3e-4),
        reward=RewardConfig(label_budget=4000, labels_per_session=50, session_interval=5000, max_epochs=10),
    )


def _surf(config: TrainConfig, family: str, name: str) -> TrainConfig:
    """What SURF changes: steps on labelled and pseudo-labelled pairs instead of epochs up to an accuracy."""
    if name == "paper":
        max_epochs, inv_label_ratio = (20, 10) if family == "metaworld" else (1000, 100)
        return replace(
            config,
            reward=replace(config.reward, max_epochs=max_epochs),
            surf=replace(config.surf, inv_label_ratio=inv_label_ratio),
        )
    # A published session of 1000 labels is 7800 steps of 640 pairs each, about an hour of one core. Smaller batches make
    # more steps of as many pairs.
    return replace(
        config,
        reward=replace(config.reward, max_epochs=10, batch_size=32, learning_rate=1e-3),
        surf=replace(config.surf, unlabelled_batch_ratio=2),
    )


def _cpu_dm_control() -> TrainConfig:
    return TrainConfig(
        steps=300_000,
        threads=1,
        random_steps=1000,
        pretrain_steps=3000,
        eval_interval=5000,
        eval_episodes=5,
        sac=_sac((128, 128), 128, 1e-3),
        reward=RewardConfig(
            hidden=(128, 128, 128),
            label_budget=1000,
            labels_per_session=50,
            session_interval=4000,
            max_epochs=50,
        ),
    )


def _cpu_metaworld() -> TrainConfig:
    return TrainConfig(
        steps=300_000,
        threads=1,
        random_steps=1000,
        pretrain_steps=4000,
        eval_interval=5000,
        eval_episodes=5,
        sac=_sac((128, 128), 128, 1e-3),
        reward=RewardConfig(
            hidden=(128, 128, 128),
            label_budget=2000,
            labels_per_session=50,
            session_interval=4000,
            max_epochs=20,
        ),
    )


def _cpu_tabular() -> TrainConfig:
    config = _cpu_dm_control()
    return replace(config, sac=_sac((64, 64), 64, 1e-3), reward=replace(config.reward, hidden=(64, 64, 64)))


def _tabular(config: TrainConfig, env: str) -> TrainConfig:
    """What follows from the problem: episodes of at most 200 steps, and in Four-Rooms one reward of 1 in each."""
    # From α = .1, adapted at PEBBLE's 1e-4, the entropy bonus of all the steps before the goal outweighs that reward: in
    # 10 000 steps SAC learned to stay away.
    sac = replace(config.sac, initial_temperature=0.01, temperature_learning_rate=1e-3)
    if env == "tabular/rand-mdp":
        sac = replace(sac, discount=RAND_MDP_DISCOUNT)
    return replace(
        config,
        steps=30_000,
        random_steps=1000,
        pretrain_steps=1000,
        eval_interval=2500,
        eval_episodes=50,
        checkpoint_interval=2500,
        sac=sac,
        reward=replace(
            config.reward,
            # Shorter than the shortest way to a goal of Four-Rooms, 12 steps: segments of every episode can be compared.
            segment_length=10,
            label_budget=1000,
            labels_per_session=50,
            session_interval=1000,
            # Never exceeded: a fit takes all its epochs. Most pairs are ties, and the few others are soon in their right
            # order by a hair's breadth, which is no reward to learn from.
            accuracy_target=1.0,
        ),
    )
