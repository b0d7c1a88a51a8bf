"""The run folder: nothing is overwritten, nothing is half written, everything can be read back."""

from __future__ import annotations

import csv
import importlib.metadata
import json

import pytest
import torch

from parl_core.errors import ConfigError, RunFolderError
from parl_core.provenance import FACTS, SIMULATORS
from parl_core.training.run_folder import COLUMNS, RunFolder, free_run_path, read_metrics
from tests.training.point_mass import tiny_config


def test_rows_are_written_as_they_come_and_come_back(tmp_path):
    folder = RunFolder.create(tmp_path / "run", tiny_config())
    folder.add_row({"step": 10, "true_return": 1.5, "labels": 0, "reward_accuracy": None})
    folder.add_row({"step": 20, "true_return": float("nan"), "labels": 8})
    with open(tmp_path / "run" / "metrics.csv") as file:
        rows = list(csv.reader(file))
    assert tuple(rows[0]) == COLUMNS
    assert rows[1][:2] == ["10", "1.5"]
    assert rows[1][COLUMNS.index("reward_accuracy")] == ""
    read = read_metrics(tmp_path / "run")
    assert read[0] == {"step": 10, "true_return": 1.5, "labels": 0}
    with pytest.raises(ConfigError, match="no column colour"):
        folder.add_row({"colour": 1})


def test_reopening_gives_the_config_and_the_rows_of_the_checkpoint(tmp_path):
    folder = RunFolder.create(tmp_path / "run", tiny_config())
    folder.add_row({"step": 10, "true_return": 1.0})
    folder.save({"weights": torch.ones(2)})
    folder.add_row({"step": 20, "true_return": 2.0})
    again, config = RunFolder.open(tmp_path / "run")
    assert config == tiny_config()
    state = again.load()
    assert torch.equal(state["weights"], torch.ones(2))
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [10, 20]  # reading changes nothing on disk
    again.set_rows(state["rows"])
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [10]


def test_an_occupied_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "precious").write_text("thesis")
    with pytest.raises(RunFolderError, match=r"not empty.*--resume"):
        RunFolder.create(tmp_path, tiny_config())
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]
    with pytest.raises(RunFolderError, match="Cannot make the run folder"):
        RunFolder.create(tmp_path / "precious" / "run", tiny_config())
    with pytest.raises(RunFolderError, match="not a run folder"):
        RunFolder.open(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"config.json cannot be read"):
        RunFolder.open(tmp_path)


def test_every_sitting_is_told_with_what_it_was(tmp_path):
    folder = RunFolder.create(tmp_path / "run", tiny_config())
    folder.add_sitting(0)
    folder.add_sitting(50)
    sittings = json.loads((tmp_path / "run" / "environment.json").read_text())["sittings"]
    assert [sitting["step"] for sitting in sittings] == [0, 50]
    assert {*FACTS, *SIMULATORS} <= sittings[0].keys()
    assert sittings[1]["torch"] == importlib.metadata.version("torch")
    for text in ("[]", "{", '{"sittings": 3}'):
        (tmp_path / "run" / "environment.json").write_text(text)
        with pytest.raises(RunFolderError, match="not as parl train writes it"):
            folder.add_sitting(60)


def test_a_kill_before_the_config_was_complete_leaves_a_folder_that_can_be_begun(tmp_path):
    (tmp_path / "config.json.partial").write_text('{"env')
    RunFolder.create(tmp_path, tiny_config())
    assert RunFolder.open(tmp_path)[1] == tiny_config()


def test_data_without_a_manifest_is_no_checkpoint(tmp_path):
    folder = RunFolder.create(tmp_path / "run", tiny_config())
    (tmp_path / "run" / "checkpoint").mkdir()
    (tmp_path / "run" / "checkpoint" / "tensors-1.safetensors").write_bytes(b"half")
    assert not folder.checkpoint_path.exists()
    folder.save({"weights": torch.ones(2)}, step=3)
    assert folder.checkpoint_path.exists()
    assert json.loads(folder.checkpoint_path.read_text())["step"] == 3


def test_a_foreign_metrics_file_is_named(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(RunFolderError, match="step and true_return in every row"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.csv").write_text("step,true_return\n1,high\n")
    with pytest.raises(RunFolderError, match=r"metrics.csv cannot be read"):
        read_metrics(tmp_path)


def test_free_run_path_counts_on(tmp_path):
    config = tiny_config(env="dm_control/walker-walk", seed=3)
    first = free_run_path(tmp_path, config)
    assert first.name == "dm_control-walker-walk_a-parl_seed3"
    first.mkdir()
    assert free_run_path(tmp_path, config) == first  # empty: free
    (first / "config.json").write_text("{}")
    assert free_run_path(tmp_path, config).name == first.name + "_2"
