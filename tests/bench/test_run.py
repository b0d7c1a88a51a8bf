"""parl bench: what it runs, and its mistakes as one sentence."""

from __future__ import annotations

import subprocess
import sys

import pytest

from parl_core import cli
from parl_core.bench import run
from parl_core.bench.results import write_results
from tests.bench.measured import hvp, results


@pytest.fixture
def commands(monkeypatch):
    """The commands that would be run; the list's `status` is what they end with."""

    class Commands(list):
        status = 0

    started = Commands()

    def start(command, cwd):
        started.append((command, cwd))
        return subprocess.CompletedProcess(command, started.status)

    monkeypatch.setattr(run.subprocess, "run", start)
    return started


def fails(capsys, *arguments):
    assert cli.main(["bench", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("parl: ")
    assert len(error.strip().splitlines()) == 1
    return error


def test_a_whole_run_writes_the_committed_results(commands):
    assert cli.main(["bench"]) == 0
    ((command, folder),) = commands
    assert command[:4] == [sys.executable, "-m", "pytest", str(folder / "benchmarks")]
    assert command[command.index("--results") + 1] == str(folder / "benchmarks" / "results")
    assert "-k" not in command


def test_a_part_of_it_writes_only_where_it_is_told(commands, tmp_path):
    assert cli.main(["bench", "hvp", "h64-B250", "--seconds", "0.5"]) == 0
    assert cli.main(["bench", "hvp", "--output", str(tmp_path)]) == 0
    (first, _), (second, _) = commands
    assert first[first.index("-k") + 1] == "hvp and h64-B250"
    assert first[first.index("--seconds") + 1] == "0.5"
    assert "--results" not in first
    assert second[second.index("--results") + 1] == str(tmp_path)


def test_a_red_contest_is_a_failure(commands):
    commands.status = 1
    assert cli.main(["bench"]) == 1


def test_ctrl_c(commands):
    commands.status = 2
    assert cli.main(["bench"]) == 130


def test_mistakes(commands, capsys, monkeypatch, tmp_path):
    commands.status = 5
    assert "no benchmark's name contains no and such; parl bench --list" in fails(capsys, "no", "such")
    commands.status = 4
    assert "make bench" in fails(capsys)
    assert "got 'a b'" in fails(capsys, "a b")
    assert "--seconds must be positive, got 0" in fails(capsys, "--seconds", "0")
    assert "none.json: No such file" in fails(capsys, "--compare", "none.json", "none.json")
    monkeypatch.setattr(run, "__file__", str(tmp_path / "parl_core" / "bench" / "run.py"))
    assert "needs a checkout" in fails(capsys)
    assert "needs a checkout" in fails(capsys, "--list")
    assert "needs a checkout" in fails(capsys, "--table")
    assert len(commands) == 2


def test_compare_needs_no_checkout(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "__file__", str(tmp_path / "parl_core" / "bench" / "run.py"))
    paths = [str(write_results(tmp_path / name, results(hvp()))[0]) for name in ("a", "b")]
    assert cli.main(["bench", "--compare", *paths]) == 0
    assert "within noise" in capsys.readouterr().out


def test_list_names_what_can_be_run(capsys):
    assert cli.main(["bench", "--list"]) == 0
    assert "linearization hvp[h64-B250]" in capsys.readouterr().out.splitlines()
