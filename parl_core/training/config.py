"""What a run is made of: every number a run depends on, readable, overridable and written to its folder."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, unknown_name
from ..preference.samplers import SAMPLERS
from ..preference.schedules import SCHEDULES
from ..preference.semi_supervised import SurfConfig
from ..preference.teachers import TeacherConfig
from ..rl.sac import SACConfig

ALGORITHMS = {
    "oracle": "SAC on the true reward: the ceiling",
    "pebble": "SAC on a reward learned from preferences",
    "surf": "PEBBLE with pseudo-labels and time-cropped segments",
    "a-parl": "PEBBLE whose reward update also takes the hypergradient's implicit term",
}
CURVATURES = ("fisher", "score", "identity", "none")
UTILITIES = ("likelihood", "win-rate")


@dataclass(frozen=True)
class RewardConfig:
    """Learning the reward from preferences (PEBBLE, Lee et al., ICML 2021)."""

    hidden: tuple[int, ...] = (256, 256, 256)
    """Widths of the hidden layers of each member."""
    members: int = 3
    """Networks in the ensemble."""
    learning_rate: float = 3e-4
    """Adam's."""
    batch_size: int = 128
    """Labelled pairs in one step."""
    segment_length: int = 50
    """Steps of a segment that the teacher compares."""
    label_budget: int = 1000
    """Queries that may be put to the teacher in the whole run; one that it skips counts."""
    labels_per_session: int = 100
    """Queries in one session, before the schedule."""
    schedule: str = "constant"
    """How the queries of a session change over the run of T steps: constant, decreasing as (T − t)/T, or increasing as
    T/(T − t + 1)."""
    session_interval: int = 20_000
    """Environment steps between two query sessions."""
    max_epochs: int = 50
    """Epochs over all labels in one session, at most. SURF takes as many steps as these would, whatever the accuracy."""
    accuracy_target: float = 0.97
    """A session's fit ends when the members' mean accuracy exceeds this. Not for SURF."""
    sampler: str = "disagreement"
    """How queries are chosen after the first session (which is uniform): uniform, disagreement, entropy, k-center,
    k-center-disagreement or k-center-entropy."""
    pool_episodes: int = 100
    """Queries are drawn from this many latest episodes."""


@dataclass(frozen=True)
class ImplicitConfig:
    """The implicit term of A-PARL's reward update."""

    curvature: str = "fisher"
    """Of the lower level: fisher, score (the full Hessian, from scores), identity, or none for no implicit term at all."""
    utility: str = "likelihood"
    """What the policy is judged by: likelihood (of the labels of on-policy pairs) or win-rate (of fresh segments against
    older ones, by the labels)."""
    share: float = 1.0
    """Factor on the implicit term."""
    max_ratio: float = 0.1
    """The implicit term is shortened to this multiple of the cross-entropy gradient's norm, if longer."""
    recent_steps: int = 1000
    """Steps that stand for on-policy data: on-policy queries come from the episodes that hold the latest so many steps,
    the lower level's trajectories from as many steps before those."""
    on_policy_share: float = 0.5
    """Share of each session's queries drawn uniformly from the latest episodes; the upper gradient is taken on them. With
    0 it is taken on all of the session's queries."""
    damping_ratio: float = 20.0
    """L2 weight of the lower level in multiples of SAC's temperature: what the policy's Fisher matrix is damped by."""
    rtol: float = 1e-2
    """Relative residual at which the linear solve ends; its sampling error is far larger."""
    max_iterations: int = 200
    """Conjugate-gradient iterations, at most."""
    refresh_interval: int = 50
    """Reward steps for which one hypergradient is used before it is computed anew (warm-started)."""

    def validate(self) -> None:
        """Refuse what does not exist.

        Raises:
            UnknownNameError: one sentence that names the field.
        """
        if self.curvature not in CURVATURES:
            raise unknown_name("curvature", self.curvature, CURVATURES)
        if self.utility not in UTILITIES:
            raise unknown_name("utility", self.utility, UTILITIES)


@dataclass(frozen=True)
class TrainConfig:
    """One run."""

    env: str = "dm_control/walker-walk"
    """Environment, dm_control/<domain>-<task>, metaworld/<task>, tabular/<task>, or <module>:<function> for your own."""
    algorithm: str = "a-parl"
    """oracle, pebble, surf or a-parl."""
    preset: str = "cpu"
    """Where the numbers below started from: cpu or paper."""
    seed: int = 0
    """Of everything random in the run."""
    steps: int = 100_000
    """Environment steps, of all environments together."""
    num_envs: int = 1
    """Environments that step side by side, with one SAC update for each step of each."""
    env_workers: int = 0
    """Processes that the environments are spread over; 0: they are in the trainer's own. The numbers do not change."""
    random_steps: int = 1000
    """Steps with uniformly random actions at the start."""
    pretrain_steps: int = 9000
    """Steps of state-entropy exploration after those; the first query session follows. Not for the oracle."""
    updates_after_reset: int = 100
    """Extra SAC updates after the critic is reset at the first session."""
    update_interval: int = 1
    """Environment steps per SAC update."""
    replay_capacity: int = 1_000_000
    """Transitions kept."""
    eval_interval: int = 10_000
    """Environment steps between two evaluations."""
    eval_episodes: int = 10
    """Episodes of one evaluation, with the mean action, on the true reward."""
    checkpoint_interval: int = 10_000
    """Environment steps between two checkpoints."""
    threads: int | None = None
    """Threads of torch; None leaves them as they are. Metrics repeat bit for bit only at the same number."""
    label_source: str | None = None
    """<module>:<function> that makes a label source of your own; None: the scripted teacher."""
    bpref_compat: bool = False
    """Repeat what B-Pref's code does where it differs from its own definitions: see `parl presets`."""
    sac: SACConfig = field(default_factory=SACConfig)
    """The lower level."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """The upper level."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """Who labels: a script that knows the true reward."""
    surf: SurfConfig = field(default_factory=SurfConfig)
    """What SURF adds to the upper level."""
    implicit: ImplicitConfig = field(default_factory=ImplicitConfig)
    """What A-PARL adds to it."""

    @property
    def learns_reward(self) -> bool:
        """Whether the reward is learned from preferences."""
        return self.algorithm != "oracle"

    @property
    def query_margin(self) -> int:
        """Steps at either end of a stored segment that the teacher does not see."""
        return self.surf.crop if self.algorithm == "surf" else 0

    @property
    def query_length(self) -> int:
        """Steps of a stored segment."""
        return self.reward.segment_length + 2 * self.query_margin

    @property
    def first_session(self) -> int:
        """The step of the first query session."""
        return self.random_steps + self.pretrain_steps

    def validate(self) -> None:
        """Refuse what cannot work, before anything is made.

        Raises:
            UnknownNameError, ConfigError: one sentence that names the field.
        """
        if self.algorithm not in ALGORITHMS:
            raise unknown_name("algorithm", self.algorithm, ALGORITHMS)
        if self.reward.sampler not in SAMPLERS:
            raise unknown_name("sampler", self.reward.sampler, SAMPLERS)
        if self.reward.schedule not in SCHEDULES:
            raise unknown_name("schedule", self.reward.schedule, SCHEDULES)
        self.teacher.validate()
        self.surf.validate()
        self.implicit.validate()
        positive = {
            "steps": self.steps,
            "num_envs": self.num_envs,
            "random_steps": self.random_steps,
            "update_interval": self.update_interval,
            "replay_capacity": self.replay_capacity,
            "eval_interval": self.eval_interval,
            "eval_episodes": self.eval_episodes,
            "checkpoint_interval": self.checkpoint_interval,
            "sac.batch_size": self.sac.batch_size,
            "reward.members": self.reward.members,
            "reward.batch_size": self.reward.batch_size,
            "reward.segment_length": self.reward.segment_length,
            "reward.label_budget": self.reward.label_budget,
            "reward.labels_per_session": self.reward.labels_per_session,
            "reward.session_interval": self.reward.session_interval,
            "reward.max_epochs": self.reward.max_epochs,
            "reward.pool_episodes": self.reward.pool_episodes,
            "implicit.max_iterations": self.implicit.max_iterations,
            "implicit.refresh_interval": self.implicit.refresh_interval,
            "threads": 1 if self.threads is None else self.threads,
            "sac.target_update_interval": self.sac.target_update_interval,
            "sac.hidden": min(self.sac.hidden, default=1),
            "reward.hidden": min(self.reward.hidden, default=1),
        }
        for name, value in positive.items():
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        not_negative = {
            "seed": self.seed,
            "env_workers": self.env_workers,
            "pretrain_steps": self.pretrain_steps,
            "updates_after_reset": self.updates_after_reset,
            "sac.temperature_learning_rate": self.sac.temperature_learning_rate,
            "implicit.share": self.implicit.share,
            "implicit.max_ratio": self.implicit.max_ratio,
            "implicit.damping_ratio": self.implicit.damping_ratio,
        }
        for name, number in not_negative.items():
            if not 0 <= number < float("inf"):
                raise ConfigError(f"{name} must be finite and at least 0, got {number}")
        above_zero = {
            "sac.actor_learning_rate": self.sac.actor_learning_rate,
            "sac.critic_learning_rate": self.sac.critic_learning_rate,
            "sac.initial_temperature": self.sac.initial_temperature,
            "sac.polyak": self.sac.polyak,
            "reward.learning_rate": self.reward.learning_rate,
            "implicit.rtol": self.implicit.rtol,
        }
        for name, number in above_zero.items():
            if not 0 < number < float("inf"):
                raise ConfigError(f"{name} must be finite and above 0, got {number}")
        at_most_one = {
            "sac.discount": self.sac.discount,
            "sac.polyak": self.sac.polyak,
            "reward.accuracy_target": self.reward.accuracy_target,
            "implicit.on_policy_share": self.implicit.on_policy_share,
            "implicit.rtol": self.implicit.rtol,
        }
        for name, number in at_most_one.items():
            if not 0 <= number <= 1:
                raise ConfigError(f"{name} must lie in [0, 1], got {number}")
        if self.random_steps < 10 or self.replay_capacity < 10:
            raise ConfigError(
                f"random_steps and replay_capacity must be at least 10, got {self.random_steps} and "
                f"{self.replay_capacity}"
            )
        if self.algorithm == "surf" and self.surf.crop >= self.reward.segment_length:
            raise ConfigError(
                f"surf.crop must be below reward.segment_length = {self.reward.segment_length}, got {self.surf.crop}"
            )
        if self.algorithm == "a-parl" and self.reward.pool_episodes < 2:
            raise ConfigError(
                "reward.pool_episodes must be at least 2 for a-parl, whose upper and lower data come from different "
                f"episodes, got {self.reward.pool_episodes}"
            )
        if self.algorithm == "a-parl" and self.implicit.recent_steps < self.reward.segment_length:
            raise ConfigError(
                f"implicit.recent_steps must hold a segment of {self.reward.segment_length} steps, "
                f"got {self.implicit.recent_steps}"
            )


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The config as nested dicts that JSON can hold."""
    return dataclasses.asdict(config)


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def from_dict(data: Mapping[str, Any]) -> TrainConfig:
    """The config that `to_dict` took apart.

    Raises:
        ConfigError: a field is unknown or of the wrong type.
    """
    return _build(TrainConfig, data, "config")


def _build(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} must be a table of fields, got {type(data).__name__}")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise ConfigError(f"{where} has no field {', '.join(unknown)}: it was written by another version")
    values = {}
    for name, value in data.items():
        place = f"{where}.{name}"
        if dataclasses.is_dataclass(hints[name]):
            values[name] = _build(hints[name], value, place)
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
            _check_type(hints[name], values[name], place)
    return kind(**values)


def _check_type(hint: Any, value: Any, place: str) -> None:
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = tuple(typing.get_origin(a) or a for a in allowed)
    if float in plain:
        plain += (int,)
    if not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain):
        raise ConfigError(f"{place} must be {hint}, got {value!r}")
    if isinstance(value, tuple):
        for number, item in enumerate(value):
            _check_type(typing.get_args(hint)[0], item, f"{place}[{number}]")
