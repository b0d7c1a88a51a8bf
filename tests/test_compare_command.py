"""`parl compare` from the command line, with real processes."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time

import pytest

from parl_core import cli
from tests.test_cli import TINY, fails

BASE = ["compare", "--envs", "tabular/rand-mdp", "--algorithms", "oracle", "pebble", "--seeds", "1"]


def test_ctrl_c_stops_all_runs_and_the_same_command_goes_on_to_the_same_numbers(tmp_path, capsys):
    output = tmp_path / "comparison"
    command = [*BASE, "--steps", "600", "--jobs", "2", "--output", str(output), *TINY]
    process = subprocess.Popen(
        [sys.executable, "-m", "parl_core", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(output.glob("runs/*/checkpoint*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes at once
    _, errors = process.communicate(timeout=60)  # which returns when the last process is gone
    assert process.returncode == 130
    assert errors.startswith("parl: stopped with 0 of 2 runs done; go on, ")
    assert errors.endswith(f"with: parl {' '.join(command)}\n")
    assert not (output / "table.md").exists()
    assert cli.main(command) == 0
    assert "tabular/rand-mdp: true return" in capsys.readouterr().out
    for algorithm in ("oracle", "pebble"):
        alone = tmp_path / algorithm
        options = ["--env", "tabular/rand-mdp", "--algorithm", algorithm, "--steps", "600", "--run-dir", str(alone)]
        assert cli.main(["train", *options, *TINY]) == 0
        ours = output / "runs" / f"tabular-rand-mdp_{algorithm}_seed0" / "metrics.csv"
        assert ours.read_bytes() == (alone / "metrics.csv").read_bytes()
    with open(output / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [str(step) for step in range(100, 601, 100)] * 2
    capsys.readouterr()
    assert cli.main(["plot", *map(str, output.glob("runs/*")), "--output", str(tmp_path / "all.png")]) == 0
    assert "steps = 700 (it was 600)" in fails(capsys, *[{"600": "700"}.get(word, word) for word in command])


def test_mistakes_are_told_before_a_folder_is_made(capsys, tmp_path, monkeypatch):
    where = ["--output", str(tmp_path / "comparison")]
    assert "--seeds must be at least 1, got 0" in fails(capsys, *BASE[:-1], "0", *where)
    assert "--jobs must be at least 1, got 0" in fails(capsys, *BASE, "--jobs", "0", *where)
    assert "did you mean a-parl" in fails(capsys, "compare", "--algorithms", "oracle", "aparl", *where)
    assert "did you mean tabular/rand-mdp" in fails(capsys, "compare", "--envs", "tabular/rand-mdpp", *where)
    assert "did you mean cpu" in fails(capsys, *BASE, "--preset", "cpuu", *where)
    assert "steps must be at least 1, got 0" in fails(capsys, *BASE, "--steps", "0", *where)
    assert "reward.members must be at least 1" in fails(capsys, *BASE, "--reward.members", "0", *where)
    assert "--seed is for parl train" in fails(capsys, *BASE, "--seed", "3", *where)
    assert "--env is for parl train" in fails(capsys, *BASE, "--env", "tabular/four-rooms", *where)
    for module in ("tyro", "matplotlib", "rich.console", "safetensors", "tensorboard"):
        with monkeypatch.context() as context:
            context.setitem(sys.modules, module, None)
            assert "pip install 'parl-core[train]'" in fails(capsys, *BASE, *where)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "thesis").write_text("precious")
    assert "no folder of parl compare" in fails(capsys, *BASE, "--output", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


def test_the_options_of_a_run_are_handed_on(monkeypatch):
    import parl_core.comparison.compare as module

    seen = []
    monkeypatch.setattr(module, "compare", lambda *arguments, **options: seen.append((arguments, options)))
    assert cli.main([*BASE, "--preset", "paper", "--reward.label-budget", "77", "--sac.hidden", "5", "6"]) == 0
    ((configs, seeds, path), options) = seen[0]
    assert [config.algorithm for config in configs] == ["oracle", "pebble"]
    assert {(c.env, c.preset, c.reward.label_budget, c.sac.hidden) for c in configs} == {
        ("tabular/rand-mdp", "paper", 77, (5, 6))
    }
    assert configs[0].pretrain_steps == 0 < configs[1].pretrain_steps  # each with its own preset
    assert (seeds, path.parts) == (1, ("runs", "compare"))
    assert options["jobs"] >= 1
    assert options["command"].startswith("parl compare --envs tabular/rand-mdp ")


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "--help"])
    assert stop.value.code in (0, None)
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--envs", "--algorithms", "--seeds", "--preset", "--steps", "--jobs"))
