"""kill −9 at twenty moments of a run: every resume succeeds, and metrics and state end as if nothing had happened.

Most moments are drawn uniformly from the time that the steps of a whole run take, and counted from when a process begins
with its steps, so that none is spent on imports. The others are a call of fsync, so that the process dies for certain
before its first checkpoint, in the midst of one, or between two.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from parl_core.training.trainer import Event

OPTIONS = (
    "--env tabular/rand-mdp --algorithm a-parl --seed 3 --steps 400 --random-steps 60 --pretrain-steps 40 "
    "--updates-after-reset 3 --update-interval 4 --eval-interval 50 --eval-episodes 1 --checkpoint-interval 25 "
    "--replay-capacity 500 --sac.hidden 8 8 --sac.batch-size 8 --reward.hidden 8 --reward.segment-length 5 "
    "--reward.label-budget 24 --reward.labels-per-session 8 --reward.session-interval 200 --reward.max-epochs 3 "
    "--reward.pool-episodes 4 --implicit.refresh-interval 3 --threads 1"
).split()
STEPS = 400
PRELOADED = (
    "matplotlib.pyplot",
    "parl_core.commands.train",
    "parl_core.training.train",
    "safetensors.torch",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "tyro",
)
"""What a forked process need not import again."""
KILLS = 20
TOGETHER = 5
"""Kills that one run meets, one after the other; it ends when they are used up."""


class Moment(NamedTuple):
    """When a process dies."""

    seconds: float | None = None
    """After it began with its steps."""
    fsyncs: int | None = None
    """Instead of this call of fsync, counted from 0."""


class Sitting(NamedTuple):
    """How a process ended."""

    killed: bool
    seconds: float
    """From when it began with its steps; 0 if it did not come so far."""


class Run:
    """`parl train` in processes of their own, forked where everything is imported and no thread is running yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def finished(self) -> bool:
        """Whether the run said so on its last lines."""
        try:
            return json.loads((self.path / "summary.json").read_text())["steps"] == STEPS
        except FileNotFoundError:
            return False

    @property
    def checkpoint_step(self) -> int:
        """Where a resume goes on; 0 without a checkpoint."""
        return self._manifest()["step"] if (self.path / "checkpoint" / "manifest.json").exists() else 0

    def outcome(self) -> tuple[bytes, list[str]]:
        """metrics.csv, and the SHA-256 of all that the last checkpoint holds: every network, label and random state."""
        digests = [file["sha256"] for file in self._manifest()["files"].values()]
        return (self.path / "metrics.csv").read_bytes(), digests

    def _manifest(self) -> dict:
        return json.loads((self.path / "checkpoint" / "manifest.json").read_text())

    def sit(self, moment: Moment | None = None) -> Sitting:
        """Begin the run, or go on with it, until its end or until `moment`; any other end is an error."""
        begun = (self.path / "config.json").exists()
        arguments = ["train", "--resume", str(self.path)] if begun else ["train", "--run-dir", str(self.path), *OPTIONS]
        begins, tell = os.pipe()
        child = os.fork()
        if child == 0:
            _command(arguments, self.path.with_suffix(".log"), moment, tell)
        os.close(tell)
        has_begun = os.read(begins, 1) != b""  # nothing: it died before
        start = time.monotonic()
        os.close(begins)
        if has_begun and moment is not None and moment.seconds is not None:
            _kill_after(child, moment.seconds)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if not killed and os.waitstatus_to_exitcode(status) != 0:
            raise AssertionError(f"{arguments} ended with {status}: {self.path.with_suffix('.log').read_text()}")
        return Sitting(killed, time.monotonic() - start if has_begun else 0.0)


def _command(arguments: list[str], log: Path, moment: Moment | None, tell: int) -> None:
    """In a forked process: the command line, which tells when it begins with its steps, and may die by its own hand."""
    from parl_core import cli
    from parl_core.training.trainer import Trainer

    def begin(trainer: Trainer) -> Iterator[Event]:
        os.write(tell, b"!")
        return real(trainer)

    status = 70
    try:
        real, Trainer.run = Trainer.run, begin
        with open(log, "a") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            if moment is not None and moment.fsyncs is not None:
                _die_at_fsync(moment.fsyncs)
            status = cli.main(arguments)
    finally:
        os._exit(status)


def _die_at_fsync(number: int) -> None:
    real, calls = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1
        real(descriptor)

    os.fsync = fsync


def _kill_after(child: int, seconds: float) -> None:
    """Kill a process, unless it has ended by then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)


def moments(seconds: float, generator: random.Random) -> Iterator[Moment]:
    """Without end: the first before the first checkpoint, then three in ten at a call of fsync, mostly in a checkpoint."""
    yield Moment(fsyncs=2)
    while True:
        for at_fsync in generator.sample([True] * 3 + [False] * 7, 10):
            yield Moment(fsyncs=generator.randrange(3, 24)) if at_fsync else Moment(generator.uniform(0, seconds))


def main(root: Path) -> None:
    """Let a run end in peace, then others that are killed; prints what was killed, as JSON."""
    for module in PRELOADED:
        importlib.import_module(module)
    importlib.import_module("torch").set_num_threads(1)
    whole = Run(root / "whole")
    sitting = whole.sit()
    assert not sitting.killed
    assert whole.finished
    expected = whole.outcome()
    planned = moments(sitting.seconds, random.Random(20))
    resumed_at: list[int] = []
    halfway = number = 0
    while len(resumed_at) < KILLS:
        run = Run(root / f"run{number}")
        number += 1
        for moment in itertools.islice(planned, min(TOGETHER, KILLS - len(resumed_at))):
            if not run.sit(moment).killed:
                break
            resumed_at.append(run.checkpoint_step)
            folder = run.path / "checkpoint"
            halfway += folder.is_dir() and len(list(folder.iterdir())) != 3
        if not run.finished:
            run.sit()
        assert run.finished
        assert run.outcome() == expected, f"{run.path} differs"
    print(json.dumps({"resumed_at": resumed_at, "halfway": halfway, "runs": number}))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_twenty_moments_ends_as_the_one_left_in_peace(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.test_kill", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["resumed_at"]) == KILLS
    assert found["halfway"] >= 1
    assert len(set(found["resumed_at"])) >= 4  # of the eleven checkpoints, none counted as one


if __name__ == "__main__":
    main(Path(sys.argv[1]))
