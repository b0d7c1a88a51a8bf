"""`parl train`: train a policy and its reward, or go on with a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ConfigError, import_extra, unknown_name


def run(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    tyro = import_extra("tyro", "train", needed_for="parl train")
    rich_console = import_extra("rich.console", "train", needed_for="parl train")

    @dataclass
    class Train:
        """Train a policy, and the reward it is trained on.

        Every number of the preset can be set as well, for example --sac.batch-size 256, --reward.label-budget 500,
        --implicit.damping-ratio 10, --eval-interval 5000; config.json in a run folder lists them all.
        """

        env: str | None = None
        """dm_control/<domain>-<task>, metaworld/<task>, tabular/<task>, or <module>:<function> that makes an environment of
        your own; dm_control/walker-walk unless given."""
        algorithm: str | None = None
        """oracle, pebble, surf or a-parl; a-parl unless given."""
        preset: str | None = None
        """cpu or paper; cpu unless given. `parl presets` shows both."""
        labels: int | None = None
        """For the paper preset: another of the published label budgets, with the session size published for it; `parl
        presets` lists them. Any others: --reward.label-budget and --reward.labels-per-session."""
        teacher: str | None = None
        """Who labels: oracle, mistake, noisy, skip, equal or myopic; oracle unless given. --teacher.mistake 0.2 and the like
        set its numbers."""
        seed: int | None = None
        """Of everything random; 0 unless given."""
        steps: int | None = None
        """Environment steps; the preset's unless given."""
        run_dir: Path | None = None
        """A new folder for the run; one is made under runs/ unless given."""
        resume: Path | None = None
        """Go on with the run in this folder; of the other options only --steps, --profile and --wandb may come along."""
        profile: bool = False
        """Print where the time went."""
        wandb: bool = False
        """Send the scalars to Weights & Biases too; a run that goes on keeps its id there."""

    given, others = tyro.cli(Train, args=arguments, prog="parl train", return_unknown_args=True)

    from ..preference.teachers import TEACHERS
    from ..training.config import TrainConfig
    from ..training.presets import preset
    from ..training.run_folder import free_run_path
    from ..training.train import Options, resume, train

    console, options = rich_console.Console(), Options(profile=given.profile, wandb=given.wandb)
    if given.resume is not None:
        _only_steps_with_resume(vars(given), others)
        resume(given.resume, given.steps, console, options)
        return 0
    config = preset(
        given.env or TrainConfig.env,
        given.algorithm or TrainConfig.algorithm,
        given.preset or TrainConfig.preset,
        given.labels,
    )
    chosen = {name: getattr(given, name) for name in ("seed", "steps") if getattr(given, name) is not None}
    config = replace(config, **chosen)
    if given.teacher is not None:
        if given.teacher not in TEACHERS:
            raise unknown_name("teacher", given.teacher, TEACHERS)
        config = replace(config, teacher=TEACHERS[given.teacher])
    if others:
        config = tyro.cli(TrainConfig, args=others, default=config, prog="parl train")
    train(config, given.run_dir or free_run_path(Path("runs"), config), console, options)
    return 0


def _only_steps_with_resume(given: dict[str, object], others: list[str]) -> None:
    extra = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None and value is not False]
    extra = [name for name in extra if name not in ("--resume", "--steps", "--profile", "--wandb")] + others
    if extra:
        raise ConfigError(
            "--resume takes the run's own settings; only --steps, --profile and --wandb may come along, got "
            + ", ".join(extra)
        )
