"""kill −9 at twenty moments of a run: every resume succeeds, and the metrics end as if nothing had happened.

The moments are seeded. Most are a share of the time that the whole run takes; the others are a call of fsync, so that
the process dies for certain before its first checkpoint, in the midst of one, or between two.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

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
TOGETHER = 5
"""Kills that one run meets, one after the other; it ends when they are used up."""


class Moment(NamedTuple):
    """When a process dies."""

    seconds: float | None = None
    """After its start."""
    fsyncs: int | None = None
    """Instead of this call of fsync, counted from 0."""


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

    def sit(self, moment: Moment | None = None) -> tuple[bool, float]:
        """Begin the run, or go on with it, until its end or until `moment`.

        Returns whether it was killed, and the seconds it took. Any other end is an error.
        """
        begun = (self.path / "config.json").exists()
        arguments = ["train", "--resume", str(self.path)] if begun else ["train", "--run-dir", str(self.path), *OPTIONS]
        start = time.monotonic()
        child = os.fork()
        if child == 0:
            _command(arguments, self.path.with_suffix(".log"), moment)
        if moment is not None and moment.seconds is not None:
            _kill_after(child, moment.seconds)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if not killed and os.waitstatus_to_exitcode(status) != 0:
            raise AssertionError(f"{arguments} ended with {status}: {self.path.with_suffix('.log').read_text()}")
        return killed, time.monotonic() - start


def _command(arguments: list[str], log: Path, moment: Moment | None) -> None:
    """In a forked process: the command line, which may die by its own hand."""
    from parl_core import cli

    status = 70
    try:
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


def moments(seconds: float, generator: random.Random) -> list[Moment]:
    """Twenty: the first before the first checkpoint, six more at a call of fsync, mostly within a checkpoint."""
    drawn = [Moment(seconds=generator.uniform(0, 0.8 * seconds)) for _ in range(13)]
    drawn += [Moment(fsyncs=generator.randrange(3, 24)) for _ in range(6)]
    generator.shuffle(drawn)
    return [Moment(fsyncs=2), *drawn]


def main(root: Path) -> None:
    """Let a run end in peace, then others that are killed; prints what was killed, as JSON."""
    for module in PRELOADED:
        importlib.import_module(module)
    importlib.import_module("torch").set_num_threads(1)
    whole = Run(root / "whole")
    killed, seconds = whole.sit()
    assert not killed
    assert whole.finished
    expected = (whole.path / "metrics.csv").read_bytes()
    planned = moments(seconds, random.Random(20))
    deaths, without_checkpoint, halfway = 0, 0, 0
    number = 0
    while deaths < len(planned):
        run = Run(root / f"run{number}")
        number += 1
        for moment in planned[deaths : deaths + TOGETHER]:
            killed, _ = run.sit(moment)
            deaths += killed
            folder = run.path / "checkpoint"
            without_checkpoint += killed and not (folder / "manifest.json").exists()
            halfway += killed and folder.is_dir() and len(list(folder.iterdir())) != 3
            if not killed:
                break
        if not run.finished:
            run.sit()
        assert run.finished
        assert (run.path / "metrics.csv").read_bytes() == expected, f"{run.path} differs"
    print(json.dumps({"deaths": deaths, "without_checkpoint": without_checkpoint, "halfway": halfway, "runs": number}))


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
    assert found["deaths"] == 20
    assert found["without_checkpoint"] >= 1
    assert found["halfway"] >= 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
