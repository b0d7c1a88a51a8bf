"""`parl compare`: algorithms × seeds × environments over the cores, with one table and one picture at the end."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import ConfigError, import_extra

_OWN = ("env", "algorithm", "preset", "seed", "steps")
"""Of a run's settings, those that the command has options of its own for."""


def run(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    tyro = import_extra("tyro", "train", needed_for="parl compare")
    rich_console = import_extra("rich.console", "train", needed_for="parl compare")
    for module in ("matplotlib", "safetensors", "tensorboard"):
        import_extra(module, "train", needed_for="parl compare")

    from ..workers import one_thread

    with one_thread():  # around the import of NumPy
        from ..comparison.compare import compare
        from ..envs import make_env
        from ..provenance import available_cores
        from ..training.config import ALGORITHMS, TrainConfig
        from ..training.presets import preset

        @dataclass
        class Compare:
            """Train every algorithm on every environment with every seed, a process each; end with tables and curves.

            The same command goes on where it was stopped. All other options of parl train are handed on to every run,
            for example --reward.label-budget 500.
            """

            envs: tuple[str, ...] = (TrainConfig.env,)
            """Environments, as parl train has them."""
            algorithms: tuple[str, ...] = tuple(ALGORITHMS)
            """Algorithms; all unless given. Shares of the Oracle's return need the oracle among them."""
            seeds: int = 3
            """Runs of each algorithm on each environment, with the seeds 0, 1, …"""
            preset: str = TrainConfig.preset
            """cpu or paper."""
            steps: int | None = None
            """Environment steps of each run; the preset's unless given."""
            jobs: int = field(default_factory=available_cores)
            """Runs at once; as many as there are cores unless given. A container's CPU quota is not seen."""
            output: Path = Path("runs", "compare")
            """The comparison's folder; one that is begun is gone on with."""

        given, others = tyro.cli(Compare, args=arguments, prog="parl compare", return_unknown_args=True)
        for name in ("seeds", "jobs"):
            if getattr(given, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, got {getattr(given, name)}")
        configs = []
        for env in dict.fromkeys(given.envs):
            for algorithm in dict.fromkeys(given.algorithms):
                config = preset(env, algorithm, given.preset)
                config = config if given.steps is None else replace(config, steps=given.steps)
                if others:
                    begin = config
                    config = tyro.cli(TrainConfig, args=others, default=config, prog="parl compare")
                    _refuse_own(begin, config)
                config.validate()
                configs.append(config)
            make_env(env, 0).close()  # a name that does not exist is told before hours of work
        if not configs:
            raise ConfigError("parl compare needs at least one environment and one algorithm")
        compare(
            configs,
            given.seeds,
            given.output,
            jobs=given.jobs,
            command=shlex.join(["parl", "compare", *arguments]),
            console=rich_console.Console(),
        )
    return 0


def _refuse_own(before: object, after: object) -> None:
    for name in _OWN:
        if getattr(before, name) != getattr(after, name):
            raise ConfigError(f"--{name} is for parl train; parl compare has --envs, --algorithms, --seeds and --steps")
