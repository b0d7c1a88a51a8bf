"""One run from start to end: makes or reopens the run folder, drives the trainer, and keeps everything written down."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..envs import make_env
from ..envs.own import load_function
from ..envs.vector import make_environments
from ..errors import ConfigError, Interrupted, import_extra
from ..files import locked_if_possible
from ..preference.label_sources import LabelSource
from ..rl.rollout import Evaluation
from .config import TrainConfig, flatten, from_dict, to_dict
from .display import Display, summary_table
from .loggers import make_loggers
from .plots import draw_run
from .profile import profile_table
from .run_folder import RunFolder
from .trainer import Evaluated, Event, Ticked, Trainer, env_seeds, seeds

COMMAND = "parl train"


@dataclass(frozen=True)
class Options:
    """What a run is given beside its numbers; none of it is kept in the run folder."""

    environment: Callable[[int], Any] | None = None
    """Makes your own environment from a seed, in place of the one that `TrainConfig.env` names."""
    label_source: LabelSource | None = None
    """Labels, in place of the scripted teacher or of what `TrainConfig.label_source` names."""
    profile: bool = False
    """Print where the time went."""
    wandb: bool = False
    """Send the scalars to Weights & Biases too."""
    notice: Callable[[Event], None] | None = None
    """Is told of every event, after it has been written down."""


def train(config: TrainConfig, path: Path, console: Console, options: Options = Options()) -> RunFolder:
    """Train anew into the empty or new folder `path`.

    Raises:
        ParlError: one sentence on what is wrong with the configuration, the environment or the folder.
        Interrupted: Ctrl-C.
    """
    config.validate()
    _require_extras()
    with _trainer(config, options) as trainer, locked_if_possible(path, COMMAND):
        folder = RunFolder.create(path, config)
        return _begin(trainer, folder, console, options)


def resume(path: Path, steps: int | None, console: Console, options: Options = Options()) -> RunFolder:
    """Go on with the run in `path` from its last checkpoint (from the start if it has none), to `steps` if given.

    The options must be those that the run was begun with.

    Raises:
        ParlError: no run folder or one in use, a damaged checkpoint, changed settings, or nothing left to do.
        Interrupted: Ctrl-C.
    """
    RunFolder.open(path)  # what is no run folder is not made into one by locking it
    with locked_if_possible(path, COMMAND):
        return _resume(path, steps, console, options)


def _resume(path: Path, steps: int | None, console: Console, options: Options) -> RunFolder:
    folder, config = RunFolder.open(path)
    if steps is not None:
        config = replace(config, steps=steps)
    config.validate()
    _require_extras()
    if not folder.checkpoint_path.exists():
        with _trainer(config, options) as trainer:
            aside = folder.set_aside_rows()
            kept = f"; its evaluations so far are in {aside}" if aside else ""
            _say(console, f"{path} has no checkpoint: the run begins anew{kept}")
            folder.write_json("config.json", to_dict(config))
            return _begin(trainer, folder, console, options)
    state = folder.load()
    before = from_dict(state["config"])
    _refuse_changes(before, config, path)
    random = Evaluation(**{**state["random"], "returns": tuple(state["random"]["returns"])})
    done = state["trainer"]["step"]  # several environments may go beyond the last step
    if done >= config.steps:
        if before.steps == config.steps != folder.summarised_steps():
            folder.set_rows(state["rows"])
            return _close(folder, config, random, console)  # it was stopped after its last step
        raise ConfigError(
            f"The run in {path} has done {done} steps, and {config.steps} are asked for: give a larger --steps to go on"
        )
    with _trainer(config, options) as trainer:
        trainer.load_state_dict(state["trainer"])
        folder.set_rows(state["rows"])
        folder.write_json("config.json", to_dict(config))
        _say(console, f"{config.algorithm} on {config.env} goes on at step {trainer.step} in {path}")
        return _run(trainer, folder, random, console, options)


def _begin(trainer: Trainer, folder: RunFolder, console: Console, options: Options) -> RunFolder:
    config = trainer.config
    _say(console, f"{config.algorithm} on {config.env}, preset {config.preset}, seed {config.seed} → {folder.path}")
    return _run(trainer, folder, trainer.evaluate_random_policy(), console, options)


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _require_extras() -> None:
    """Whatever the run will need at its end is asked for before it begins."""
    for module in ("matplotlib", "safetensors", "tensorboard"):
        import_extra(module, "train", needed_for="parl train")


def _refuse_changes(before: TrainConfig, now: TrainConfig, path: Path) -> None:
    """A checkpoint goes on under the configuration it was made with; only the length of the run may change."""
    old, new = (flatten(to_dict(replace(config, steps=1))) for config in (before, now))
    changed = [f"{name} = {new[name]} (it was {old[name]})" for name in old if old[name] != new[name]]
    if changed:
        raise ConfigError(
            f"The run in {path} cannot go on with other settings than its own: {path / 'config.json'} now says "
            + ", ".join(changed)
        )


@contextmanager
def _trainer(config: TrainConfig, options: Options) -> Iterator[Trainer]:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    source = _label_source(config, options)
    task = config.env if options.environment is None else options.environment
    eval_env = make_env(task, seeds(config.seed)["eval_env"])
    try:
        envs = make_environments(task, env_seeds(config.seed, config.num_envs), config.env_workers)
        try:
            yield Trainer(config, envs, eval_env, source)
        finally:
            envs.close()
    finally:
        eval_env.close()


def _label_source(config: TrainConfig, options: Options) -> LabelSource | None:
    """One of the user's own, if there is one.

    Raises:
        ConfigError: it lacks a method, which else would show when the first episode is over, or at the first session.
    """
    source = options.label_source
    if source is None and config.label_source is not None:
        source = load_function(config.label_source, "label source")()
    lacking = [name for name in ("label", "episode_ended") if not callable(getattr(source, name, None))]
    if source is not None and lacking:
        raise ConfigError(
            "label_source must give an object with label(first, second) and episode_ended(true_return, length), "
            f"got a {type(source).__name__} without {' and '.join(lacking)}"
        )
    return source


def _run(trainer: Trainer, folder: RunFolder, random: Evaluation, console: Console, options: Options) -> RunFolder:
    config, profile = trainer.config, trainer.profile
    folder.add_sitting(trainer.step)
    saved_at, start, first_step = trainer.step, time.perf_counter(), trainer.step

    def save() -> None:
        nonlocal saved_at
        with profile.section("checkpoints"):
            state = {"config": to_dict(config), "trainer": trainer.state_dict(), "random": vars(random)}
            folder.save(state, trainer.step)
        saved_at = trainer.step

    with (
        make_loggers(folder.path, config, trainer.step, options.wandb) as loggers,
        Display(config, console) as display,
        _CtrlC() as ctrl_c,
    ):
        display.start_at(trainer.step)
        try:
            for event in trainer.run():
                with profile.section("logging"):
                    display.show(event)
                    loggers.log(event)
                    if isinstance(event, Evaluated):
                        folder.add_row(event.row)
                # Only here does the trainer's state hold everything.
                if isinstance(event, Ticked) and (
                    event.step - saved_at >= config.checkpoint_interval or event.step >= config.steps
                ):
                    save()
                if options.notice:
                    options.notice(event)
                ctrl_c.check()
        except KeyboardInterrupt as error:
            at = f"the last checkpoint is at step {saved_at}" if saved_at else "before the first checkpoint"
            raise Interrupted(
                f"Stopped at step {trainer.step}, {at}; go on with: parl train --resume {folder.path}"
            ) from error
    seconds = time.perf_counter() - start
    _close(folder, config, random, console)
    if options.profile:
        console.print(profile_table(profile.seconds, seconds, trainer.step - first_step))
    return folder


def _close(folder: RunFolder, config: TrainConfig, random: Evaluation, console: Console) -> RunFolder:
    """What comes after the last step: the picture, the summary and the table."""
    curve = draw_run(folder.path, random.true_return)
    folder.write_json(
        "summary.json",
        {
            "steps": config.steps,
            "random_return": random.true_return,
            "first_return": folder.rows[0]["true_return"],
            "last_return": folder.rows[-1]["true_return"],
        },
    )
    console.print(summary_table(random, folder.rows))
    _say(console, f"Run folder: {folder.path}   curve: {curve}")
    return folder


class _CtrlC:
    """Holds a Ctrl-C back until `check`, so that it neither tears a step apart nor is lost in one; a second is not held."""

    def __enter__(self) -> _CtrlC:
        self._asked = False
        self._is_main = threading.current_thread() is threading.main_thread()  # others may not set handlers
        if self._is_main:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_main:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, *_: object) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def check(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed."""
        if self._asked:
            raise KeyboardInterrupt
