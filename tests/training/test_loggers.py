"""Scalars of events in TensorBoard's files and in Weights & Biases, the latter by a stand-in that records its calls."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from parl_core.errors import MissingExtraError, ParlError, RunFolderError
from parl_core.preference.reward_learning import RewardFit
from parl_core.training.config import to_dict
from parl_core.training.loggers import make_loggers, scalars
from parl_core.training.run_folder import COLUMNS
from parl_core.training.trainer import EpisodeEnded, Evaluated, Ticked
from parl_core.training.upper_level import SessionEnded
from tests.training.point_mass import tiny_config


def _evaluated(step):
    return Evaluated({**dict.fromkeys(COLUMNS), "step": step, "true_return": 3.5, "labels": 8})


def _filled(kind, **values):
    """An instance with zeros where nothing is given."""
    return kind(**{field.name: values.get(field.name, 0) for field in dataclasses.fields(kind)})


def test_the_numbers_of_each_event():
    assert scalars(Ticked(20)) == (20, {})
    assert scalars(EpisodeEnded(30, 1.5)) == (30, {"train/true_return": 1.5})
    assert scalars(_evaluated(40)) == (40, {"eval/true_return": 3.5, "eval/labels": 8})
    fit = _filled(RewardFit, accuracy=0.75, loss=0.5)
    implicit = SimpleNamespace(solver_iterations=7, ratio=0.25)
    session = _filled(SessionEnded, step=50, fit=fit, implicit=implicit, fresh_accuracy=0.625)
    named = {"reward/accuracy": 0.75, "reward/loss": 0.5, "implicit/solver_iterations": 7, "implicit/ratio": 0.25}
    assert scalars(session) == (50, {**named, "reward/fresh_accuracy": 0.625})
    assert scalars(dataclasses.replace(session, fresh_accuracy=None)) == (50, named)


def _tensorboard(path):
    found = EventAccumulator(str(path)).Reload()
    return {name: [(s.step, s.value) for s in found.Scalars(name)] for name in found.Tags()["scalars"]}


@pytest.fixture
def first_event_file(monkeypatch):
    """Files of one second are read in the order of their number in this process, as text: 10 comes before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def test_tensorboard_goes_on_from_the_checkpoint(tmp_path, first_event_file):
    config = tiny_config()
    with make_loggers(tmp_path, config, 0, False) as loggers:
        for event in (Ticked(20), EpisodeEnded(25, 1.0), _evaluated(30), EpisodeEnded(50, 2.0)):
            loggers.log(event)
    with make_loggers(tmp_path, config, 25, False) as loggers:
        loggers.log(EpisodeEnded(50, 2.5))
    assert _tensorboard(tmp_path) == {
        "train/true_return": [(25, 1.0), (50, 2.5)],
        "eval/true_return": [],
        "eval/labels": [],
    }


def test_a_run_that_begins_anew_supersedes_all_that_tensorboard_saw(tmp_path, first_event_file):
    for value in (1.0, 2.0):  # the first was killed before its first checkpoint
        with make_loggers(tmp_path, tiny_config(), 0, False) as loggers:
            loggers.log(EpisodeEnded(1, value))
    assert _tensorboard(tmp_path) == {"train/true_return": [(1, 2.0)]}


def test_the_writer_threads_of_others_keep_their_tracebacks(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("threading.excepthook", hook := seen.append)
    with make_loggers(tmp_path, tiny_config(), 0, False):
        import threading

        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
    assert [arguments.exc_type for arguments in seen] == [ZeroDivisionError]
    assert threading.excepthook is hook


class WandB(ModuleType):
    """The part of wandb that is used: init, Settings, Error, and a run's log, finish and starting_step.

    Like the real one, a run that goes on by its id starts after the last step that was logged to it.
    """

    Error = type("Error", (Exception,), {})

    def __init__(self):
        super().__init__("wandb")
        self.begun: list[dict] = []
        self.logged: dict[str, list[tuple[int, dict]]] = {}
        self.exit_codes: list[int] = []
        self.Settings = lambda **settings: settings

    def init(self, *, project, name, group, config, id, resume, dir, settings):
        self.begun.append(dict(project=project, name=name, group=group, config=config, id=id, resume=resume, dir=dir))
        assert settings == {"console": "off"}
        rows = self.logged.setdefault(id, [])
        start = rows[-1][0] + 1 if rows else 0

        def log(data, step):
            assert step >= (rows[-1][0] if rows else 0)
            rows.append((step, data))

        return SimpleNamespace(log=log, starting_step=start, finish=lambda exit_code: self.exit_codes.append(exit_code))


@pytest.fixture
def wandb(monkeypatch):
    module = WandB()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_a_resumed_run_goes_on_under_its_id_and_repeats_nothing(tmp_path, wandb):
    config = tiny_config("pebble")
    with make_loggers(tmp_path, config, 0, True) as loggers:
        for event in (Ticked(20), EpisodeEnded(25, 1.0), EpisodeEnded(50, 2.0)):
            loggers.log(event)
    with make_loggers(tmp_path, config, 25, True) as loggers:
        for event in (EpisodeEnded(50, 2.0), _evaluated(60)):
            loggers.log(event)
    first, second = wandb.begun
    assert first == second
    assert first["config"] == to_dict(config)
    assert first["id"] == json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert (first["project"], first["name"], first["group"]) == ("parl-core", tmp_path.name, "point-mass pebble")
    assert (first["resume"], first["dir"]) == ("allow", str(tmp_path))
    assert wandb.logged[first["id"]] == [
        (25, {"train/true_return": 1.0}),
        (50, {"train/true_return": 2.0}),
        (60, {"eval/true_return": 3.5, "eval/labels": 8}),
    ]
    assert wandb.exit_codes == [0, 0]
    assert _tensorboard(tmp_path)["train/true_return"] == [(25, 1.0), (50, 2.0)]


def test_runs_have_ids_of_their_own_and_projects_can_be_chosen(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "walkers")
    for name in ("one", "other"):
        with make_loggers(tmp_path / name, tiny_config(), 0, True):
            pass
    assert wandb.begun[0]["id"] != wandb.begun[1]["id"]
    assert {run["project"] for run in wandb.begun} == {"walkers"}


def test_a_run_that_fails_is_told_so(tmp_path, wandb):
    with pytest.raises(ZeroDivisionError), make_loggers(tmp_path, tiny_config(), 0, True):
        raise ZeroDivisionError
    assert wandb.exit_codes == [1]


def test_wandb_missing_refusing_or_with_a_torn_id(tmp_path, wandb, monkeypatch):
    def refuse(**_):
        raise wandb.Error("no API key")

    monkeypatch.setattr(wandb, "init", refuse)
    with (
        pytest.raises(ParlError, match=r"no API key\): log in with `wandb login`, or set WANDB_MODE=offline"),
        make_loggers(tmp_path, tiny_config(), 0, True),
    ):
        pass
    (tmp_path / "wandb.json").write_text("{")
    with (
        pytest.raises(RunFolderError, match=r"wandb\.json cannot be read"),
        make_loggers(tmp_path, tiny_config(), 0, True),
    ):
        pass
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        pytest.raises(MissingExtraError, match=r"--wandb needs wandb .*parl-core\[wandb\]"),
        make_loggers(tmp_path, tiny_config(), 0, True),
    ):
        pass
    with make_loggers(tmp_path, tiny_config(), 0, False):
        pass


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_the_real_wandb_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step in (0, 25):
        with make_loggers(tmp_path, tiny_config(), step, True) as loggers:
            loggers.log(EpisodeEnded(step + 25, 1.0))
    run_id = json.loads((tmp_path / "wandb.json").read_text())["id"]
    written = list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(written) >= 1 and all(file.stat().st_size > 0 for file in written)
