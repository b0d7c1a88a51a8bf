"""Where a run's scalars go, beside metrics.csv: TensorBoard always, Weights & Biases if asked for."""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from ..errors import ParlError, RunFolderError, import_extra
from ..files import write_atomically
from .config import TrainConfig, to_dict
from .trainer import EpisodeEnded, Evaluated, Event
from .upper_level import SessionEnded


class Loggers:
    """Writes what events carry to every one of some destinations."""

    def __init__(self, destinations: list[_Destination]) -> None:
        self._destinations = destinations

    def log(self, event: Event) -> None:
        """Write the event's scalars, if it has any.

        Raises:
            RunFolderError: the disk is full, or the folder went away.
        """
        step, values = scalars(event)
        if values:
            for destination in self._destinations:
                destination.write(step, values)


@contextmanager
def make_loggers(path: Path, config: TrainConfig, step: int, wandb: bool) -> Iterator[Loggers]:
    """The loggers of the run in the folder `path`, for as long as the context lasts.

    Args:
        path: the run folder, which exists.
        config: of the run.
        step: at which the run goes on; 0 for a new one.
        wandb: whether Weights & Biases gets the scalars too. A run that goes on there keeps its id, which wandb.json in
            the folder holds; WANDB_MODE=offline needs no network, WANDB_PROJECT names another project than parl-core.

    Raises:
        MissingExtraError: wandb is asked for and not installed.
        RunFolderError: the folder cannot be written.
        ParlError: Weights & Biases refuses to begin, as without a login.
    """
    with ExitStack() as stack:
        stack.enter_context(_writer_threads_errors_left_to_us())
        destinations: list[_Destination] = [stack.enter_context(_TensorBoard(path, step))]
        if wandb:
            destinations.append(stack.enter_context(_WeightsAndBiases(path, config)))
        yield Loggers(destinations)


def scalars(event: Event) -> tuple[int, dict[str, float]]:
    """The environment step of an event, and its numbers by their names in the logs; without any for a sign of life."""
    if isinstance(event, EpisodeEnded):
        return event.step, {"train/true_return": event.true_return}
    if isinstance(event, SessionEnded):
        implicit = vars(event.implicit) if event.implicit else {}
        fit = {"reward/accuracy": event.fit.accuracy, "reward/loss": event.fit.loss}
        if event.fresh_accuracy is not None:
            fit["reward/fresh_accuracy"] = event.fresh_accuracy
        return event.step, {**fit, **{f"implicit/{name}": value for name, value in implicit.items()}}
    if isinstance(event, Evaluated):
        row = {name: value for name, value in event.row.items() if value is not None}
        step = int(row.pop("step"))
        return step, {f"eval/{name}": value for name, value in row.items()}
    return event.step, {}


class _Destination(AbstractContextManager["_Destination"], Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...


class _TensorBoard:
    """By environment step; what an earlier process logged after the step at which this one goes on is superseded."""

    def __init__(self, path: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer: Any = SummaryWriter(str(path), purge_step=step + 1)
        except OSError as error:
            raise RunFolderError(f"Cannot write TensorBoard events into {path}: {error.strerror or error}") from error

    def __enter__(self) -> _TensorBoard:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._writer.close()
        except OSError as error:
            raise RunFolderError(f"Cannot write TensorBoard events: {error.strerror or error}") from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        try:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        except OSError as error:
            raise RunFolderError(f"Cannot write TensorBoard events: {error.strerror or error}") from error


class _WeightsAndBiases:
    """One W&B run for one run folder. What W&B has already is not sent again: a resumed run repeats it to the bit."""

    def __init__(self, path: Path, config: TrainConfig) -> None:
        wandb = import_extra("wandb", "wandb", needed_for="--wandb")
        try:
            self._run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "parl-core"),
                name=path.name,
                group=f"{config.env} {config.algorithm}",
                config=to_dict(config),
                id=_run_id(path / "wandb.json"),
                resume="allow",
                dir=str(path),
                settings=wandb.Settings(console="off"),  # the progress display redraws itself many times a second
            )
        except wandb.Error as error:
            raise ParlError(
                f"Weights & Biases cannot begin ({error}): log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def __enter__(self) -> _WeightsAndBiases:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._run.finish(exit_code=0 if kind is None else 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._run.starting_step:
            self._run.log(dict(values), step=step)


def _run_id(file: Path) -> str:
    """The W&B id of the run in this folder, made up at its beginning."""
    try:
        return str(json.loads(file.read_text())["id"])
    except FileNotFoundError:
        run_id = secrets.token_hex(8)
        write_atomically(file, (json.dumps({"id": run_id}) + "\n").encode())
        return run_id
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{file} cannot be read: {error}") from error


@contextmanager
def _writer_threads_errors_left_to_us() -> Iterator[None]:
    """TensorBoard's writer thread prints a traceback when the disk is full, and the next call raises the same error."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not (type(arguments.thread).__name__ == "_AsyncWriterThread" and isinstance(arguments.exc_value, OSError)):
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        if threading.excepthook is hook:
            threading.excepthook = before
