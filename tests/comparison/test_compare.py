"""A comparison goes on where it was, keeps what was done when runs fail, and refuses folders that are not its own."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import math
import re
import shutil
from dataclasses import replace

import pytest
from rich.console import Console

from parl_core.comparison import compare as module
from parl_core.comparison import display
from parl_core.comparison.compare import compare
from parl_core.comparison.display import RunsDisplay
from parl_core.errors import ConfigError, Interrupted, RunFolderError
from parl_core.training.run_folder import RunFolder
from parl_core.workers import TaskError, do_tasks
from tests.training.point_mass import PointMass, replace_environments, tiny_config

FILES = {"comparison.json", "metrics.csv", "results.csv", "table.md", "curves.png", "runs"}
CONFIGS = [tiny_config(algorithm, steps=200, threads=1) for algorithm in ("oracle", "pebble")]


def do_here(patch):
    """The runs are done in this process, on a substitute for a simulator."""
    replace_environments(patch, PointMass)
    patch.setattr(module, "run_tasks", lambda work, tasks, jobs, heard: do_tasks(work, tasks, heard))


@pytest.fixture(autouse=True)
def here(monkeypatch):
    do_here(monkeypatch)


def run(path, configs=CONFIGS, seeds=2):
    """Compare without a terminal; returns what was printed."""
    console = Console(force_terminal=False, width=200)
    with console.capture() as shown:
        compare(configs, seeds, path, jobs=1, command="parl compare --seeds 2", console=console)
    return shown.get()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed comparison; left as it is."""
    path = tmp_path_factory.mktemp("whole") / "comparison"
    with pytest.MonkeyPatch.context() as patch:
        do_here(patch)
        patch.setattr(display, "_PLAIN_PAUSE", math.inf)  # on a slow machine, too
        shown = run(path)
    (path.parent / "shown").write_text(shown)
    return path


@pytest.fixture
def copy(whole, tmp_path):
    """A comparison that a test may change."""
    return shutil.copytree(whole, tmp_path / "comparison")


def metrics(path):
    with open(path / "metrics.csv") as file:
        return list(csv.DictReader(file))


def test_a_comparison_leaves_its_files_and_says_what_they_hold(whole):
    shown = (whole.parent / "shown").read_text()
    assert {path.name for path in whole.iterdir()} == FILES
    assert [line for line in shown.splitlines() if "ended" in line] == ["0 of 4 runs ended"]
    order = re.findall(r"^point-mass_(.*): return \S+ after", shown, flags=re.MULTILINE)
    assert order == ["pebble_seed0", "pebble_seed1", "oracle_seed0", "oracle_seed1"]  # the longest first
    assert "point-mass: true return" in shown
    assert "point-mass: what it takes" in shown
    rows = metrics(whole)
    assert list(rows[0]) == ["env", "algorithm", "seed", "step", "true_return", "success_rate", "labels"]
    assert [(row["algorithm"], row["seed"], row["step"]) for row in rows] == [
        (algorithm, seed, step) for algorithm in ("oracle", "pebble") for seed in "01" for step in ("100", "200")
    ]
    for row in rows:
        with open(whole / "runs" / f"point-mass_{row['algorithm']}_seed{row['seed']}" / "metrics.csv") as file:
            own = {line["step"]: line for line in csv.DictReader(file)}[row["step"]]
        assert {name: float(row[name]) for name in ("true_return", "success_rate", "labels")} == {
            name: float(own[name]) for name in ("true_return", "success_rate", "labels")
        }
    assert {row["true_return"] for row in rows if row["seed"] == "0"}.isdisjoint(
        row["true_return"] for row in rows if row["seed"] == "1"
    )
    with open(whole / "results.csv") as file:
        results = list(csv.DictReader(file))
    assert [row["algorithm"] for row in results] == ["oracle", "pebble"]
    finals = [float(row["true_return"]) for row in rows if row["step"] == "200"]
    assert float(results[1]["final_mean"]) == pytest.approx(sum(finals[2:]) / 2)
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (whole / "table.md").read_text()
    assert page.startswith("`parl compare --seeds 2`\n\nComputed 20")
    assert f"mujoco {importlib.metadata.version('mujoco')}" in page  # a simulator decides the numbers
    assert "| pebble " in page


def test_the_record_holds_the_settings_and_where_each_run_was_done(whole):
    record = json.loads((whole / "comparison.json").read_text())
    assert record["command"] == "parl compare --seeds 2"
    assert record["settings"]["seeds"] == 2
    assert record["settings"]["configs"]["point-mass"]["pebble"]["reward"]["label_budget"] == 18
    assert len(record["runs"]) == 4
    for name, facts in record["runs"].items():
        (sitting,) = facts["sittings"]
        assert name == f"point-mass_{facts['algorithm']}_seed{facts['seed']}"
        assert sitting["to_step"] == 200
        assert 0 < sitting["from_step"] <= 40
        assert sitting["seconds"] > 0
        assert {"commit", "torch", "cpu", "mujoco", "jobs"} <= sitting.keys()


def test_a_run_is_what_parl_train_makes_of_it(whole, tmp_path):
    from parl_core.training.train import train

    train(replace(CONFIGS[1], seed=1), tmp_path / "run", Console(quiet=True))
    ours = whole / "runs" / "point-mass_pebble_seed1" / "metrics.csv"
    assert ours.read_bytes() == (tmp_path / "run" / "metrics.csv").read_bytes()


def test_a_complete_comparison_is_only_reported_again(copy, whole):
    (copy / "curves.png").unlink()
    before = {path: path.stat().st_mtime_ns for path in (copy / "runs").rglob("*")}
    shown = run(copy)
    assert "ended" not in shown
    assert "point-mass: true return" in shown
    assert {path: path.stat().st_mtime_ns for path in (copy / "runs").rglob("*")} == before
    for name in FILES - {"runs", "curves.png"}:
        assert (copy / name).read_bytes() == (whole / name).read_bytes()
    assert (copy / "curves.png").exists()


def test_without_the_runs_the_files_are_enough(copy, whole):
    """As in a clone, where only the small files are."""
    shutil.rmtree(copy / "runs")
    assert "ended" not in run(copy)
    for name in FILES - {"runs", "curves.png"}:
        assert (copy / name).read_bytes() == (whole / name).read_bytes()
    (copy / "metrics.csv").write_text("env,algorithm,seed,step,true_return,success_rate,labels\n")
    with pytest.raises(RunFolderError, match="do not belong together"):
        run(copy)


@pytest.mark.parametrize("name", ["metrics.csv", "results.csv", "table.md"])
def test_with_the_runs_what_was_made_of_them_is_not_needed(copy, whole, name):
    """Nobody is told to remove hours of work for a file that can be written anew."""
    (copy / name).unlink()
    assert "ended" not in run(copy)
    assert (copy / name).read_bytes() == (whole / name).read_bytes()


def test_an_interrupted_comparison_goes_on_from_the_checkpoints(whole, tmp_path, monkeypatch):
    """Ctrl-C comes to the second run, after a checkpoint."""
    path, real = tmp_path / "comparison", RunFolder.save

    def save(folder, state, step):
        real(folder, state, step)
        if folder.path.name == "point-mass_pebble_seed1" and state["trainer"]["step"] >= 100:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save", save)
    # A worker process would never hear of a Ctrl-C; here it comes out of the run as `Interrupted`, as from parl train.
    monkeypatch.setattr("parl_core.training.train.Interrupted", KeyboardInterrupt)
    with pytest.raises(Interrupted, match=r"1 of 4 runs done; go on, .* with: parl compare --seeds 2$"):
        run(path)
    monkeypatch.setattr(RunFolder, "save", real)
    assert not (path / "table.md").exists()
    (path / "runs" / "point-mass_pebble_seed1" / "metrics.csv.partial").write_bytes(b"torn")
    assert "1 of 4 runs ended" in run(path)
    assert (path / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    sittings = json.loads((path / "comparison.json").read_text())["runs"]["point-mass_pebble_seed1"]["sittings"]
    assert [sitting["to_step"] for sitting in sittings] == [100, 200]
    assert sittings[1]["from_step"] > 100


def test_a_run_that_fails_is_named_and_the_others_go_on(copy, whole):
    """One run lost its summary and its checkpoint is garbage, another is not begun."""
    broken = copy / "runs" / "point-mass_pebble_seed0"
    (broken / "summary.json").unlink()
    checkpoint = RunFolder(broken).checkpoint_path
    kept = checkpoint.read_bytes()
    checkpoint.write_bytes(b"garbage")
    shutil.rmtree(copy / "runs" / "point-mass_oracle_seed1")
    (copy / "metrics.csv").unlink()
    record = json.loads((copy / "comparison.json").read_text())
    (copy / "comparison.json").write_text(json.dumps({"settings": record["settings"]}))  # as before the end
    with pytest.raises(TaskError, match=r"1 of 4 runs failed, .* run=point-mass_pebble_seed0 failed: .*is damaged"):
        run(copy)
    assert "Traceback" in (broken / "failure.txt").read_text()
    assert {(row["algorithm"], row["seed"]) for row in metrics(copy)} == {
        ("oracle", "0"),
        ("oracle", "1"),
        ("pebble", "1"),
    }
    checkpoint.write_bytes(kept)
    run(copy)
    assert not (broken / "failure.txt").exists()
    assert (copy / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


def test_a_run_with_other_settings_is_not_taken_for_one_of_ours(copy):
    name = copy / "runs" / "point-mass_pebble_seed0"
    config = json.loads((name / "config.json").read_text())
    (name / "config.json").write_text(json.dumps({**config, "eval_episodes": 3}))
    with pytest.raises(TaskError, match="has other settings than the comparison"):
        run(copy)


@pytest.mark.parametrize(
    ("configs", "seeds", "message"),
    [
        (CONFIGS, 3, r"seeds = 3 \(it was 2\)"),
        (CONFIGS[:1], 2, r"algorithms = oracle \(it was oracle pebble\)"),
        ([replace(config, env="other") for config in CONFIGS], 2, r"envs = other \(it was point-mass\)"),
        (
            [CONFIGS[0], replace(CONFIGS[1], sac=replace(CONFIGS[1].sac, batch_size=17))],
            2,
            r"point-mass.pebble.sac.batch_size = 17 \(it was 16\); remove",
        ),
    ],
)
def test_another_comparisons_folder_is_refused_and_left_alone(whole, configs, seeds, message):
    before = {path: path.read_bytes() for path in whole.iterdir() if path.is_file()}
    with pytest.raises(ConfigError, match=message):
        run(whole, configs, seeds)
    assert {path: path.read_bytes() for path in whole.iterdir() if path.is_file()} == before


def test_the_order_of_environments_and_algorithms_is_no_other_comparison(whole, copy):
    run(copy, CONFIGS[::-1])
    assert (copy / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis").write_text("precious")
    with pytest.raises(RunFolderError, match="not empty and no folder of parl compare"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]
    (tmp_path / "comparison.json").write_text('{"settings": 3}')
    with pytest.raises(RunFolderError, match="none of parl compare"):
        run(tmp_path)
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(RunFolderError, match="cannot be read"):
        run(tmp_path)


def test_runs_under_way_are_told_in_plain_lines_now_and_then(monkeypatch):
    console = Console(force_terminal=False, width=200)
    with console.capture() as shown, RunsDisplay({"a": 100, "b": 200, "c": 50}, ["c"], console) as runs:
        runs.show("a", 10, None)
        monkeypatch.setattr(display, "_PLAIN_PAUSE", 0.0)
        runs.show("b", 20, 3.25)
        monkeypatch.setattr(display, "_PLAIN_PAUSE", 60.0)
        runs.show("b", 40, 5.0)
        runs.end("a", "a: return 7")
    assert shown.get().splitlines() == [
        "1 of 3 runs ended",
        "1 of 3 runs ended; a 10 return –, b 20 return 3.25",
        "a: return 7",
    ]


def test_on_a_terminal_every_run_under_way_has_a_line(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    console = Console(force_terminal=True, file=io.StringIO(), width=120)
    with RunsDisplay({"a": 100, "b": 200}, [], console) as runs:
        runs.show("a", 10, None)
        runs.show("b", 20, 3.25)
        runs.end("b", "b: return 5")
        runs.show("a", 60, 2.5)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    last = [line.split() for line in shown.splitlines() if line.strip()][-2:]
    assert [line[0] for line in last] == ["all", "a"]
    assert "260/300" in last[0]  # b counts as done
    assert "60/100" in last[1]
    assert last[1][-3:-1] == ["return", "2.5"]
    assert "b: return 5" in shown
