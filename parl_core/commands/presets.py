"""`parl presets`: the numbers that runs start from."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import import_extra

if TYPE_CHECKING:
    from ..training.config import TrainConfig

_PEBBLE = "PEBBLE (Lee et al. 2021)"
_BPREF = "B-Pref (Lee et al. 2021)"
_SURF = "SURF (Park et al. 2022)"
_HERE = "parl-core"
_SOURCES = {
    "steps": _PEBBLE,
    "random_steps": _PEBBLE,
    "pretrain_steps": _PEBBLE,
    "updates_after_reset": _PEBBLE,
    "update_interval": _PEBBLE,
    "replay_capacity": _PEBBLE,
    "eval_interval": _BPREF,
    "eval_episodes": _BPREF,
    "bpref_compat": _HERE,
    "sac": _PEBBLE,
    "reward": _PEBBLE,
    "reward.schedule": _BPREF,
    "teacher": _BPREF,
    "surf": _SURF,
    "surf.pool_capacity": _SURF,
}
"""Where the numbers of `paper` come from, by field or by table of fields; what is not listed is parl-core's own."""
_NOT_USED_BY = {
    "oracle": ("pretrain_steps", "updates_after_reset", "label_source", "reward", "teacher", "surf", "implicit"),
    "pebble": ("surf", "implicit"),
    "surf": ("reward.accuracy_target", "implicit"),
    "a-parl": ("surf",),
}
_OF_THE_RUN = ("env", "algorithm", "preset", "seed")
_FIXED = """The same in every run, and no options:
  - actor and critics: ReLU, orthogonal weights, zero biases; log σ rescaled by tanh into [-5, 2]; target entropy -|A|;
  - rewards: leaky ReLU of slope 0.01 and a tanh output; Adam everywhere with (0.9, 0.999);
  - state-entropy exploration: the distance to the 5th nearest neighbour over its running standard deviation;
  - the first session's pairs are uniform; later samplers but uniform choose from 10 times as many pairs as they ask for;
  - a teacher's thresholds follow the last 10 episodes.
"""
_COMPAT = """With --bpref-compat a run repeats what B-Pref's code does otherwise than B-Pref says:
  - from the second session on, a teacher's threshold is a share of ε² of an average segment's return, instead of ε;
  - the mean of the last returns behind it begins with a return of 0;
  - a rational teacher answers an exact tie with the first segment, instead of with no preference;
  - a pair without a preference counts as one whose first segment is preferred in the accuracy that ends a fit;
  - once the replay is full, relabelling covers only the rows before the one that is written next;
  - the running mean in state-entropy exploration is that of the latest batch plus its share of the count, each batch's
    variance is the unbiased one, and a variance of 1 counts for 1e-4 values at the start;
  - a run ends with an error if the teacher skips all queries of the first session, instead of asking again later."""


def run(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    tyro = import_extra("tyro", "train", needed_for="parl presets")
    rich_console = import_extra("rich.console", "train", needed_for="parl presets")

    @dataclass
    class Presets:
        """Show the numbers that runs start from: `paper` as published, `cpu` sized for two cores, side by side.

        With --preset, one configuration is printed instead, all of it, as the options of the `parl train` that it is.
        """

        env: str | None = None
        """The task; walker-walk, door-open and button-press unless given (with --preset: walker-walk)."""
        algorithm: str = "a-parl"
        """oracle, pebble, surf or a-parl."""
        preset: str | None = None
        """cpu or paper."""

    given = tyro.cli(Presets, args=arguments, prog="parl presets")

    from ..training.config import TrainConfig
    from ..training.presets import PUBLISHED_LABELS, preset

    if given.preset is not None:
        config = preset(given.env or TrainConfig.env, given.algorithm, given.preset)
        config.validate()
        print(command_line(config))
        return 0
    console = rich_console.Console(highlight=False)
    for env in (given.env,) if given.env else tuple(PUBLISHED_LABELS):
        paper, cpu = (preset(env, given.algorithm, name) for name in ("paper", "cpu"))
        paper.validate()
        console.print(_table(paper, cpu))
        if env not in PUBLISHED_LABELS:
            console.print(f"Nobody has published numbers for {env}: these are the ones of its family.\n")
        elif given.algorithm != "oracle":
            console.print("Published label budgets of paper, and what --labels sets with them:")
            for labels, session in PUBLISHED_LABELS[env].items():
                console.print(
                    f"  --labels {labels}: --reward.label-budget {labels} --reward.labels-per-session {session}",
                    soft_wrap=True,
                )
            console.print()
    console.print(_FIXED, markup=False)
    console.print(_COMPAT, markup=False)
    return 0


def command_line(config: TrainConfig) -> str:
    """The `parl train` that runs this configuration, with every number of it; to be pasted into a shell."""
    from ..training.config import flatten, to_dict

    options = [
        shlex.join(_option(name, value)) for name, value in flatten(to_dict(config)).items() if value is not None
    ]
    return " \\\n  ".join(["parl train", *options])


def _option(name: str, value: Any) -> list[str]:
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--{'.'.join([*option.split('.')[:-1], 'no-' + option.split('.')[-1]])}"]
    return [f"--{option}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]


def _table(paper: TrainConfig, cpu: TrainConfig) -> Any:
    from rich.table import Table

    from ..training.config import flatten, to_dict

    table = Table(title=f"{paper.algorithm} on {paper.env}", title_justify="left", title_style="bold")
    for column in ("option", "paper", "", "cpu", "source of paper's"):
        table.add_column(column, no_wrap=True)
    published, small = (flatten(to_dict(config)) for config in (paper, cpu))
    for name, value in published.items():
        if name in _OF_THE_RUN or any(_lies_in(name, place) for place in _NOT_USED_BY[paper.algorithm]):
            continue
        differs = small[name] != value
        table.add_row(
            "--" + name.replace("_", "-"),
            _shown(value),
            "≠" if differs else "",
            _shown(small[name]),
            _source(name, paper),
            style="bold" if differs else None,
        )
    return table


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _source(name: str, config: TrainConfig) -> str:
    if config.algorithm == "surf" and name == "reward.max_epochs":
        return _SURF
    if config.algorithm == "oracle" and name == "random_steps":
        return _BPREF
    return next((source for place, source in reversed(_SOURCES.items()) if _lies_in(name, place)), _HERE)


def _lies_in(name: str, place: str) -> bool:
    return name == place or name.startswith(place + ".")
