"""`parl ablate`: a-parl with every curvature of the implicit term, at the same seeds, and how well each term points."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import ConfigError, import_extra

_OWN = ("env", "algorithm", "preset", "seed", "steps")
"""Of a run's settings, those that the command has options of its own for, or decides."""


def run(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    tyro = import_extra("tyro", "train", needed_for="parl ablate")
    rich_console = import_extra("rich.console", "train", needed_for="parl ablate")
    for module in ("matplotlib", "safetensors", "tensorboard"):
        import_extra(module, "train", needed_for="parl ablate")

    from ..workers import one_thread

    with one_thread():  # around the import of NumPy
        from ..ablation.ablate import ablate
        from ..provenance import available_cores
        from ..training.config import TrainConfig
        from ..training.presets import preset

        @dataclass
        class Ablate:
            """Run a-parl with no implicit term, identity, Fisher and full-score curvature; tell return, alignment and time.

            All other options of parl train are handed on to every run, for example --implicit.utility win-rate.
            """

            env: tuple[str, ...] = ("tabular/rand-mdp",)
            """Environments, as parl train has them."""
            seeds: int = 3
            """Runs of each variant on each environment, with the seeds 0, 1, …"""
            preset: str = TrainConfig.preset
            """cpu or paper."""
            steps: int | None = None
            """Environment steps of each run; the preset's unless given."""
            jobs: int = field(default_factory=available_cores)
            """Runs at once; as many as there are cores unless given."""
            output: Path = Path("runs", "ablation")
            """A new folder."""

        given, others = tyro.cli(Ablate, args=arguments, prog="parl ablate", return_unknown_args=True)
        for name in ("seeds", "jobs"):
            if getattr(given, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, got {getattr(given, name)}")
        configs = {}
        for env in dict.fromkeys(given.env):
            config = begin = preset(env, "a-parl", given.preset)
            if others:
                config = tyro.cli(TrainConfig, args=others, default=begin, prog="parl ablate")
            changed = [name for name in _OWN if getattr(config, name) != getattr(begin, name)]
            if changed or config.implicit.curvature != begin.implicit.curvature:
                raise ConfigError(
                    "parl ablate goes through the curvatures and has --env, --preset, --seeds and --steps of its own: "
                    f"leave out {', '.join(f'--{name}' for name in changed) or '--implicit.curvature'}"
                )
            config = config if given.steps is None else replace(config, steps=given.steps)
            config.validate()
            configs[env] = config
        ablate(
            configs,
            given.seeds,
            given.output,
            jobs=given.jobs,
            command=shlex.join(["parl", "ablate", *arguments]),
            console=rich_console.Console(),
        )
    return 0
