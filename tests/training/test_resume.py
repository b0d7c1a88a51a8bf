"""What a run folder is refused for, and what is taken up again, beyond the plain course of a run."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
from rich.console import Console

from parl_core import files
from parl_core.errors import ConfigError, Interrupted, RunFolderError
from parl_core.files import lock_folder
from parl_core.training import checkpoint
from parl_core.training.checkpoint import load_checkpoint, save_checkpoint
from parl_core.training.run_folder import RunFolder, read_metrics
from parl_core.training.train import Options, resume, train
from parl_core.training.trainer import Ticked
from tests.test_cli import replace_environments
from tests.training.point_mass import PointMass, tiny_config

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def point_mass(monkeypatch):
    replace_environments(monkeypatch, PointMass)


def interrupted_at(step: int) -> Options:
    """Ctrl-C at the first sign of life from `step` on."""

    def notice(event):
        if isinstance(event, Ticked) and event.step >= step:
            raise KeyboardInterrupt

    return Options(notice=notice)


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path):
    run = tmp_path / "run"
    seen = []

    def notice(event):
        if not seen:
            for attempt in (lambda: resume(run, None, QUIET), lambda: train(tiny_config("oracle"), run, QUIET)):
                with pytest.raises(RunFolderError, match="run is in use by another parl train"):
                    attempt()
        seen.append(event)

    train(tiny_config("oracle", steps=100), run, QUIET, Options(notice=notice))
    assert len(seen) > 2
    resume(run, 120, QUIET)  # the lock went with the run
    assert [row["step"] for row in read_metrics(run)] == [100, 120]
    with pytest.raises(RunFolderError, match="not a run folder"):
        resume(tmp_path / "nowhere", None, QUIET)
    assert not (tmp_path / "nowhere").exists()


def test_where_no_folder_can_be_locked_runs_go_on_without(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(RunFolderError, match=r"cannot be locked \(No locks available\)"):
        lock_folder(tmp_path, "parl compare")
    train(tiny_config("oracle", steps=100), tmp_path / "run", QUIET)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [100]


def test_a_run_beyond_its_last_step_is_closed_too(tmp_path):
    """Three environments take 102 steps where 100 are asked for."""
    run = tmp_path / "run"
    train(tiny_config(steps=100, num_envs=3), run, QUIET)
    whole = {name: (run / name).read_bytes() for name in ("summary.json", "metrics.csv")}
    assert [row["step"] for row in read_metrics(run)] == [102]
    assert RunFolder(run).summarised_steps() == 100  # what `parl compare` knows a finished run by
    with pytest.raises(ConfigError, match="has done 102 steps, and 100 are asked for: give a larger --steps"):
        resume(run, None, QUIET)
    (run / "summary.json").unlink()  # as after a kill between the last checkpoint and the end
    resume(run, None, QUIET)
    assert {name: (run / name).read_bytes() for name in whole} == whole


def test_a_run_is_not_cut_to_where_it_stands(tmp_path):
    run = tmp_path / "run"
    config = tiny_config("oracle", steps=300)
    with pytest.raises(Interrupted, match="the last checkpoint is at step 60"):
        train(config, run, QUIET, interrupted_at(60))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for steps in (50, 60):  # no evaluation has been made there
        with pytest.raises(ConfigError, match=f"has done 60 steps, and {steps} are asked for: give a larger --steps"):
            resume(run, steps, QUIET)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    resume(run, 70, QUIET)
    assert [row["step"] for row in read_metrics(run)] == [70]
    assert json.loads((run / "config.json").read_text())["steps"] == 70


class Rightmost:
    """A label source without a state."""

    def label(self, first, second):
        return (second.observations[:, -1, 0] > first.observations[:, -1, 0]).float()

    def episode_ended(self, true_return, length):
        pass


def test_labels_go_on_from_the_source_they_came_from(tmp_path):
    run, config = tmp_path / "run", tiny_config("pebble", steps=150)
    with pytest.raises(Interrupted):
        train(config, run, QUIET, replace(interrupted_at(120), label_source=Rightmost()))
    before = (run / "metrics.csv").read_bytes()
    with pytest.raises(ConfigError, match=r"which had no state_dict: ScriptedTeacher is another"):
        resume(run, None, QUIET)
    assert (run / "metrics.csv").read_bytes() == before
    resume(run, None, QUIET, Options(label_source=Rightmost()))
    with pytest.raises(Interrupted):
        train(config, tmp_path / "scripted", QUIET, interrupted_at(120))
    with pytest.raises(ConfigError, match=r"which had a state_dict: Rightmost is another"):
        resume(tmp_path / "scripted", None, QUIET, Options(label_source=Rightmost()))


def test_a_label_source_without_a_method_is_refused_before_the_run_begins(tmp_path):
    class Forgetful:
        label = Rightmost.label

    with pytest.raises(ConfigError, match="got a Forgetful without episode_ended"):
        train(tiny_config("pebble"), tmp_path / "run", QUIET, Options(label_source=Forgetful()))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_anew(tmp_path, monkeypatch):
    """As by `parl video` of a run that goes on."""
    save_checkpoint(tmp_path, {"step": 1})
    real = checkpoint.sha256

    def replaced(path):
        with monkeypatch.context() as context:
            context.setattr(checkpoint, "sha256", real)
            if len(seen := [*replaced_at]) < 2:
                replaced_at.append(path)
                save_checkpoint(tmp_path, {"step": 2 + len(seen)})
        return real(path)

    replaced_at: list[os.PathLike] = []
    monkeypatch.setattr(checkpoint, "sha256", replaced)
    assert load_checkpoint(tmp_path) == {"step": 3}
    assert len(replaced_at) == 2
    monkeypatch.undo()
    assert files.sha256 is checkpoint.sha256
    (tmp_path / "tree-3.json").unlink()
    with pytest.raises(RunFolderError, match="not complete"):
        load_checkpoint(tmp_path)
