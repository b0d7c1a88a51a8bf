"""The command line: whole short runs, and every mistake as one sentence without a traceback."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from parl_core import cli
from parl_core.errors import MissingExtraError
from parl_core.training.run_folder import RunFolder
from tests.training.point_mass import PointMass, replace_environments, tiny_config

TINY = (
    "--random-steps 40 --pretrain-steps 40 --updates-after-reset 3 --eval-interval 100 --eval-episodes 2 "
    "--checkpoint-interval 50 --sac.hidden 8 8 --sac.batch-size 16 --reward.hidden 8 --reward.segment-length 5 "
    "--reward.label-budget 18 --reward.labels-per-session 8 --reward.session-interval 60 --reward.max-epochs 4 "
    "--implicit.refresh-interval 3 --surf.crop 1"
).split()


@pytest.fixture
def point_mass(monkeypatch):
    replace_environments(monkeypatch, PointMass)


def fails(capsys, *arguments: str) -> str:
    """Run a command that must fail with one sentence on stderr; returns it."""
    status = cli.main(arguments)
    output = capsys.readouterr()
    assert status == 1
    assert output.err.startswith("parl: ")
    assert "Traceback" not in output.err + output.out
    assert len(output.err.strip().splitlines()) == 1
    return output.err


@pytest.mark.parametrize("algorithm", ["oracle", "pebble", "surf", "a-parl"])
def test_train_writes_a_whole_run_folder_and_resume_prolongs_it(point_mass, tmp_path, capsys, algorithm):
    run = tmp_path / "run"
    train = ["train", "--algorithm", algorithm, "--steps", "200", "--run-dir", str(run), *TINY]
    assert cli.main(train) == 0
    shown = capsys.readouterr().out
    assert "random policy" in shown
    assert "last evaluation" in shown
    names = {path.name for path in run.iterdir()}
    assert {"config.json", "environment.json", "metrics.csv", "checkpoint", "curve.png", "summary.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["random_return"] > 0
    assert cli.main(["train", "--resume", str(run), "--steps", "300"]) == 0
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["100", "200", "300"]
    assert (rows[-1]["labels"] != "0") == (algorithm != "oracle")
    assert (rows[-1]["implicit_to_direct"] != "") == (algorithm == "a-parl")
    assert json.loads((run / "config.json").read_text())["steps"] == 300


@pytest.mark.parametrize("algorithm", ["oracle", "pebble", "a-parl"])
def test_four_rooms_trains_and_goes_on_from_the_end_of_an_episode(tmp_path, capsys, algorithm):
    """No substitute here: the environment is the one that the command line makes."""
    run = tmp_path / "run"
    train = ["train", "--env", "tabular/four-rooms", "--algorithm", algorithm, "--preset", "cpu", "--run-dir", str(run)]
    assert cli.main([*train, "--steps", "450", *TINY]) == 0
    assert "success" in capsys.readouterr().out
    assert cli.main(["train", "--resume", str(run), "--steps", "500"]) == 0
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["100", "200", "300", "400", "450", "500"]
    assert all(float(row["success_rate"]) == float(row["true_return"]) for row in rows)  # 1 for each success
    assert int(rows[-1]["episodes"]) >= 2
    assert (rows[-1]["labels"] != "0") == (algorithm != "oracle")
    assert (rows[-1]["implicit_to_direct"] != "") == (algorithm == "a-parl")


def test_the_teachers_numbers_come_from_its_name_and_from_options(point_mass, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--teacher", "noisy", "--teacher.mistake", "0.2", "--num-envs", "2", "--steps", "100"]
    assert cli.main(["train", *options, "--run-dir", str(run), "--profile", *TINY]) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["teacher"] == {"beta": 1.0, "discount": 1.0, "mistake": 0.2, "skip": 0.0, "equal": 0.0}
    assert config["num_envs"] == 2
    shown = capsys.readouterr().out
    assert "environment steps/s: 100 in" in shown
    assert all(section in shown for section in ("simulator", "SAC update", "reward learning", "checkpoints"))
    assert "did you mean noisy?" in fails(capsys, "train", "--teacher", "noizy")
    assert "teacher.mistake" in fails(capsys, "train", "--teacher.mistake", "1.5")


def test_environments_and_labels_of_ones_own_go_by_name(tmp_path, capsys, monkeypatch):
    (tmp_path / "own_task.py").write_text(
        "import torch\n"
        "from tests.training.point_mass import PointMass\n"
        "def make(seed):\n"
        "    return PointMass('mine', seed)\n"
        "class Rightmost:\n"
        "    def label(self, first, second):\n"
        "        return (second.observations[:, :, 0].sum(1) > first.observations[:, :, 0].sum(1)).float()\n"
        "    def episode_ended(self, true_return, length):\n"
        "        assert length == 25\n"
    )
    monkeypatch.chdir(tmp_path)
    where = ["--env", "own_task:make", "--label-source", "own_task:Rightmost"]
    train = ["train", "--algorithm", "pebble", "--steps", "150", "--run-dir", "run", *TINY]
    assert cli.main([*train, *where]) == 0
    assert cli.main(["train", "--resume", "run", "--steps", "200"]) == 0
    labels = RunFolder.open(tmp_path / "run")[0].load()["trainer"]["upper"]["dataset"]
    first, second = labels["segments"][:, :, :, 0].sum(2).unbind(1)
    assert torch.equal(labels["labels"], (second > first).float())
    assert "Unknown label source" in fails(
        capsys, *train[: -len(TINY) - 2], "--label-source", "own_task:Leftmost", *where[:2]
    )


def test_the_same_seed_gives_the_same_metrics(point_mass, tmp_path):
    for name in ("one", "two"):
        assert cli.main(["train", "--steps", "200", "--run-dir", str(tmp_path / name), *TINY]) == 0
    assert (tmp_path / "one" / "metrics.csv").read_bytes() == (tmp_path / "two" / "metrics.csv").read_bytes()


def test_plot_draws_several_runs(point_mass, tmp_path, capsys):
    for seed in "01":
        assert cli.main(["train", "--steps", "100", "--seed", seed, "--run-dir", str(tmp_path / seed), *TINY]) == 0
    picture = tmp_path / "curves.png"
    assert cli.main(["plot", str(tmp_path / "0"), str(tmp_path / "1"), "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert "not a run folder" in fails(capsys, "plot", str(tmp_path))
    assert "at least one run folder" in fails(capsys, "plot")
    assert "Cannot write" in fails(capsys, "plot", str(tmp_path / "0"), "--output", str(tmp_path / "none" / "x.png"))


def test_doctor_prints_the_table(capsys):
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "discounted_returns" in shown
    assert "cpp" in shown


def test_unknown_names_offer_near_misses(capsys, tmp_path):
    where = ["--run-dir", str(tmp_path / "run")]
    assert "did you mean train" in fails(capsys, "trian")
    assert "did you mean dm_control/walker-walk" in fails(capsys, "train", "--env", "dm_control/walker-wolk", *where)
    assert "metaworld/door-open" in fails(capsys, "train", "--env", "metaworld/door-opn", *where)
    assert "did you mean tabular/four-rooms" in fails(capsys, "train", "--env", "tabular/four-room", *where)
    assert "did you mean a-parl" in fails(capsys, "train", "--algorithm", "aparl", *where)
    assert "did you mean cpu" in fails(capsys, "train", "--preset", "cpuu", *where)
    assert not (tmp_path / "run").exists()


def test_an_occupied_or_unwritable_folder_is_left_alone(point_mass, capsys, tmp_path):
    (tmp_path / "thesis").write_text("precious")
    assert "not empty" in fails(capsys, "train", "--run-dir", str(tmp_path), *TINY)
    assert (tmp_path / "thesis").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]
    assert "Cannot make the folder" in fails(capsys, "train", "--run-dir", str(tmp_path / "thesis" / "run"), *TINY)
    assert "not a run folder" in fails(capsys, "train", "--resume", str(tmp_path / "nowhere"))


def test_resume_refuses_what_it_cannot_honour(point_mass, capsys, tmp_path):
    run = str(tmp_path / "run")
    assert cli.main(["train", "--steps", "100", "--run-dir", run, *TINY]) == 0
    capsys.readouterr()
    assert "larger --steps" in fails(capsys, "train", "--resume", run)
    assert "--algorithm" in fails(capsys, "train", "--resume", run, "--algorithm", "pebble")
    (tmp_path / "run" / "checkpoint" / "manifest.json").write_bytes(b"garbage")
    before = (tmp_path / "run" / "metrics.csv").read_bytes()
    assert "is damaged" in fails(capsys, "train", "--resume", run, "--steps", "200")
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == before


def test_resume_without_a_checkpoint_begins_anew(point_mass, capsys, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert cli.main(["train", "--steps", "100", "--run-dir", str(whole), *TINY]) == 0
    stopped.mkdir()
    (stopped / "config.json").write_bytes((whole / "config.json").read_bytes())
    capsys.readouterr()
    assert cli.main(["train", "--resume", str(stopped)]) == 0
    assert "begins anew" in capsys.readouterr().out
    shutil.rmtree(stopped / "checkpoint")  # as in a run that was handed on without its large file
    before = (stopped / "metrics.csv").read_bytes()
    assert cli.main(["train", "--resume", str(stopped)]) == 0
    assert (stopped / "metrics.1.csv").read_bytes() == before
    assert (stopped / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


def test_a_resume_supersedes_what_tensorboard_saw_after_the_checkpoint(point_mass, tmp_path, monkeypatch):
    from torch.utils import tensorboard

    seen, real = [], tensorboard.SummaryWriter

    def spy(path, purge_step=None):
        seen.append(purge_step)
        return real(path, purge_step=purge_step)

    monkeypatch.setattr(tensorboard, "SummaryWriter", spy)
    run = str(tmp_path / "run")
    assert cli.main(["train", "--steps", "100", "--run-dir", run, *TINY]) == 0
    assert cli.main(["train", "--resume", run, "--steps", "200"]) == 0
    assert seen == [1, 101]


def test_a_run_stopped_after_its_last_step_is_closed(point_mass, capsys, tmp_path):
    run = tmp_path / "run"
    assert cli.main(["train", "--steps", "100", "--run-dir", str(run), *TINY]) == 0
    metrics = (run / "metrics.csv").read_bytes()
    for name in ("summary.json", "curve.png"):
        (run / name).unlink()
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert (run / "summary.json").exists()
    assert (run / "curve.png").exists()
    assert (run / "metrics.csv").read_bytes() == metrics
    assert cli.main(["train", "--resume", str(run), "--steps", "200"]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 200
    (run / "summary.json").write_text(
        json.dumps({**summary, "steps": 100})
    )  # the prolonged run, stopped before its end
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert json.loads((run / "summary.json").read_text()) == summary


def test_plot_leaves_out_a_run_without_evaluations_and_shows_negative_returns(point_mass, capsys, tmp_path):
    from parl_core.comparison import curves

    runs = [tmp_path / name for name in ("a", "b", "empty")]
    for run, algorithm in zip(runs, ("a-parl", "oracle", "oracle"), strict=True):
        arguments = ["--algorithm", algorithm, "--steps", "100", "--run-dir", str(run), *TINY]
        assert cli.main(["train", *arguments]) == 0
    (runs[0] / "metrics.csv").write_text("step,true_return\n1,-50\n2,-20\n")
    (runs[2] / "metrics.csv").write_text("step,true_return\n")
    capsys.readouterr()
    drawn = []
    real = curves.save_picture
    try:
        curves.save_picture = lambda figure, path: drawn.append(figure.axes[0].get_ylim()) or real(figure, path)
        assert cli.main(["plot", *map(str, runs), "--output", str(tmp_path / "p.png")]) == 0
    finally:
        curves.save_picture = real
    assert "empty has no evaluation yet and is left out" in capsys.readouterr().err
    assert drawn[0][0] < -50


def test_resume_under_other_settings_is_refused_and_changes_nothing(point_mass, capsys, tmp_path):
    run = tmp_path / "run"
    assert cli.main(["train", "--steps", "100", "--run-dir", str(run), *TINY]) == 0
    capsys.readouterr()
    with open(run / "metrics.csv", "a") as file:
        file.write("120,1.0\n")
    config = json.loads((run / "config.json").read_text())
    for change in (dict(seed=7), dict(env="metaworld/door-open"), dict(sac={**config["sac"], "hidden": [9, 8]})):
        (run / "config.json").write_text(json.dumps({**config, **change}))
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        message = fails(capsys, "train", "--resume", str(run), "--steps", "200")
        assert "cannot go on with other settings" in message
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    (run / "config.json").write_text(json.dumps({**config, "sac": {**config["sac"], "hidden": ["a"]}}))
    assert r"config.sac.hidden[0] must be" in fails(capsys, "train", "--resume", str(run), "--steps", "200")


def test_a_folder_with_brackets_is_a_folder(point_mass, tmp_path):
    assert cli.main(["train", "--steps", "100", "--run-dir", str(tmp_path / "[" / "x]"), *TINY]) == 0


def test_a_failed_picture_leaves_the_old_one(point_mass, capsys, tmp_path, monkeypatch):
    run, picture = tmp_path / "run", tmp_path / "curves.png"
    assert cli.main(["train", "--steps", "100", "--run-dir", str(run), *TINY]) == 0
    picture.write_bytes(b"old")
    capsys.readouterr()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert "No space left" in fails(capsys, "plot", str(run), "--output", str(picture))
    assert picture.read_bytes() == b"old"


def test_a_full_disk_is_one_sentence_and_loses_nothing(point_mass, capsys, tmp_path, monkeypatch):
    """The disk fills up after the second checkpoint: what was complete on disk is still complete."""
    run, real, calls = tmp_path / "run", os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) > 15:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr("os.fsync", fsync)
    assert "No space left on device" in fails(capsys, "train", "--steps", "300", "--run-dir", str(run), *TINY)
    monkeypatch.undo()
    replace_environments(monkeypatch, PointMass)
    assert not list(run.glob("*.partial"))
    assert cli.main(["train", "--resume", str(run)]) == 0


def test_non_finite_rewards_stop_the_run_with_a_sentence(capsys, tmp_path, monkeypatch):
    class Broken(PointMass):
        def _step(self, action):
            step = super()._step(action)
            return step._replace(reward=float("nan")) if self.taken == 7 else step

    replace_environments(monkeypatch, Broken)
    assert "reward of step 7" in fails(capsys, "train", "--run-dir", str(tmp_path / "run"), *TINY)


def test_a_missing_extra_gives_the_install_line(capsys, tmp_path, monkeypatch):
    def missing(name, seed):
        raise MissingExtraError("dm_control needs dm_control; install it with: pip install 'parl-core[dm-control]'")

    replace_environments(monkeypatch, missing)
    assert "pip install 'parl-core[dm-control]'" in fails(capsys, "train", "--run-dir", str(tmp_path / "run"))
    for module in ("matplotlib", "tensorboard", "safetensors"):  # asked for before anything is made
        with monkeypatch.context() as context:
            context.setitem(sys.modules, module, None)
            replace_environments(context, PointMass)
            assert "parl-core[train]" in fails(capsys, "train", "--run-dir", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert "pip install 'parl-core[train]'" in fails(capsys, "train")


def test_ctrl_c_says_how_to_go_on(point_mass, tmp_path):
    """A real process is interrupted; its run is resumed to the metrics of an undisturbed one."""
    code = """
import os, sys, time
import parl_core.envs.vector as vector
import parl_core.training.train as train
from tests.training.point_mass import PointMass

class Waits(PointMass):  # once there is a checkpoint, long enough to be struck
    def _step(self, action):
        if os.path.exists(os.environ["WAIT_FOR"]):
            time.sleep(0.1)
        return super()._step(action)

train.make_env = vector.make_env = Waits
from parl_core import cli
sys.exit(cli.main(sys.argv[1:]))
"""
    run, whole = tmp_path / "run", tmp_path / "whole"
    options = ["--steps", "300", *TINY, "--replay-capacity", "250", "--reward.pool-episodes", "4", "--threads", "1"]
    checkpoint = run / "checkpoint" / "manifest.json"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", "--run-dir", str(run), *options],
        env={**os.environ, "WAIT_FOR": str(checkpoint)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert f"parl train --resume {run}" in errors
    assert "Traceback" not in errors
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert cli.main(["train", "--run-dir", str(whole), *options]) == 0
    assert (run / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


def test_reproduce_refuses_in_one_sentence(capsys, tmp_path, monkeypatch):
    assert "did you mean rand-mdp" in fails(capsys, "reproduce", "randmdp")
    assert "did you mean page?" in fails(capsys, "reproduce", "pag")
    assert "the study comes first" in fails(capsys, "reproduce", "--output", str(tmp_path), "lemma1")
    where = ["--output", str(tmp_path / "run")]
    assert "--jobs must be at least 1, got 0" in fails(capsys, "reproduce", "rand-mdp", "--jobs", "0", *where)
    assert "--seeds must be at least 1, got 0" in fails(capsys, "reproduce", "rand-mdp", "--seeds", "0", *where)
    assert not (tmp_path / "run").exists()
    short = ["--seeds", "1", "--jobs", "1", *where]
    assert cli.main(["reproduce", "rand-mdp", "--steps", "2", *short]) == 0
    capsys.readouterr()
    assert "steps = 3 (it was 2)" in fails(capsys, "reproduce", "rand-mdp", "--steps", "3", *short)
    (tmp_path / "thesis").write_text("precious")
    assert "not empty" in fails(capsys, "reproduce", "rand-mdp", "--output", str(tmp_path))
    assert (tmp_path / "thesis").read_text() == "precious"
    monkeypatch.chdir(tmp_path)
    page = ["reproduce", "page", "--output", str(tmp_path / "page.md")]
    assert "neither docs/results nor runs/reproduce" in fails(capsys, *page)
    assert "no settings.json" in fails(capsys, *page, str(tmp_path))
    assert not (tmp_path / "page.md").exists()
    assert cli.main([*page, str(tmp_path / "run")]) == 0
    assert (
        f"parl reproduce rand-mdp --steps 2 --seeds 1 --jobs 1 --output {tmp_path / 'run'}\n"
        in (tmp_path / "page.md").read_text()
    )


def test_reproduce_needs_the_extra_before_it_makes_a_folder(capsys, tmp_path, monkeypatch):
    for module, extra in (("tyro", "train"), ("rich.console", "train"), ("matplotlib", "train"), ("numba", "numba")):
        with monkeypatch.context() as context:
            context.setitem(sys.modules, module, None)
            message = fails(capsys, "reproduce", "rand-mdp", "--output", str(tmp_path / "run"))
            assert f"pip install 'parl-core[{extra}]'" in message
    assert not (tmp_path / "run").exists()


def test_usage(capsys):
    assert cli.main(["--help"]) == 0
    assert "train" in capsys.readouterr().out
    assert cli.main([]) == 1
    assert cli.main(["reproduce"]) == 1
    assert "rand-mdp" in capsys.readouterr().out
    assert cli.main(["reproduce", "--help"]) == 0
    for command in ("doctor", "train"):
        try:
            assert cli.main([command, "--help"]) == 0
        except SystemExit as stop:
            assert stop.code in (0, None)
    assert cli.main(["--version"]) == 0


def test_usage_on_a_terminal_that_lacks_its_signs():
    options = {"env": {**os.environ, "PYTHONIOENCODING": "ascii"}, "capture_output": True, "text": True}
    code = "import sys; from parl_core import cli; sys.exit(cli.main(['reproduce', '--help']))"
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.returncode == 0, done.stderr
    assert "?gradient? by step" in done.stdout


def test_the_tiny_options_are_the_tiny_config():
    """What the command line overrides is what the trainer's tests use."""
    assert tiny_config().reward.label_budget == int(TINY[TINY.index("--reward.label-budget") + 1])
