"""`parl presets`: what it prints is what `parl train` runs, and the published numbers as published."""

from __future__ import annotations

import inspect
import itertools
import shlex

import pytest
import tyro

from parl_core import cli
from parl_core.commands.presets import command_line
from parl_core.models.policies import LOG_STD_BOUNDS
from parl_core.models.rewards import LEAKY_SLOPE
from parl_core.preference.samplers import POOL_RATIO
from parl_core.preference.teachers import RECENT_EPISODES
from parl_core.rl.state_entropy import StateEntropyReward
from parl_core.training.config import ALGORITHMS, TrainConfig
from parl_core.training.presets import PRESETS, preset

WALKER, DOOR, BUTTON = "dm_control/walker-walk", "metaworld/door-open", "metaworld/button-press"
ENVS = (WALKER, DOOR, BUTTON, "tabular/rand-mdp")


@pytest.mark.parametrize("env", ENVS)
def test_the_printed_options_are_the_configuration(env):
    for algorithm, name in itertools.product(ALGORITHMS, PRESETS):
        config = preset(env, algorithm, name)
        words = shlex.split(command_line(config).replace("\\\n", ""))
        assert words[:2] == ["parl", "train"]
        assert tyro.cli(TrainConfig, args=words[2:]) == config


def _cells(output: str, option: str) -> list[tuple[str, ...]]:
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "│" in line]
    return [tuple(row[1:]) for row in rows if row[0] == option]


def _shown(capsys, monkeypatch, *arguments: str) -> str:
    monkeypatch.setenv("COLUMNS", "150")
    assert cli.main(["presets", *arguments]) == 0
    return capsys.readouterr().out


def test_the_three_tasks_side_by_side(capsys, monkeypatch):
    shown = _shown(capsys, monkeypatch, "--algorithm", "surf")
    assert [f"surf on {env}" in shown for env in ENVS] == [True, True, True, False]
    pebble, surf = "PEBBLE (Lee et al. 2021)", "SURF (Park et al. 2022)"
    small = [preset(env, "surf", "cpu") for env in ENVS[:3]]
    published = ("500000", "1000000", "1000000")
    assert _cells(shown, "--steps") == [(n, "≠", str(c.steps), pebble) for n, c in zip(published, small, strict=True)]
    networks = _cells(shown, "--sac.hidden")
    assert [row[0] for row in networks] == ["1024 1024", "256 256 256", "256 256 256"]
    assert _cells(shown, "--sac.discount") == [("0.99", "", "0.99", pebble)] * 3
    assert [(row[0], row[3]) for row in _cells(shown, "--reward.max-epochs")] == [
        ("1000", surf),
        ("20", surf),
        ("20", surf),
    ]
    assert [row[0] for row in _cells(shown, "--surf.inv-label-ratio")] == ["100", "10", "10"]
    assert not _cells(shown, "--reward.accuracy-target")  # SURF has none
    for budget, session in ((100, 10), (500, 50), (1000, 100), (1000, 10), (4000, 50), (10_000, 50), (20_000, 100)):
        options = f"--reward.label-budget {budget} --reward.labels-per-session {session}\n"
        assert f"  --labels {budget}: {options}" in shown
    assert "--bpref-compat" in shown


def test_each_algorithm_shows_what_it_uses(capsys, monkeypatch):
    shown = _shown(capsys, monkeypatch, "--env", WALKER, "--algorithm", "oracle")
    assert _cells(shown, "--steps")[0][0] == "1000000"
    assert _cells(shown, "--random-steps")[0][0] == "5000"
    assert "--reward" not in shown.partition("With --bpref-compat")[0]
    shown = _shown(capsys, monkeypatch, "--env", WALKER, "--algorithm", "pebble")
    assert [row[0] for row in _cells(shown, "--reward.max-epochs")] == ["50"]
    assert "--implicit" not in shown and "--surf" not in shown and "--reward.batch-size" in shown
    assert "--implicit.damping-ratio" in _shown(capsys, monkeypatch, "--env", WALKER)


def test_the_numbers_that_are_no_options_are_those_of_the_code(capsys, monkeypatch):
    shown = _shown(capsys, monkeypatch, "--env", WALKER)
    low, high = LOG_STD_BOUNDS
    assert f"into [{low:g}, {high:g}]" in shown
    assert f"leaky ReLU of slope {LEAKY_SLOPE:g} " in shown
    neighbour = inspect.signature(StateEntropyReward).parameters["k"].default
    assert f"the {neighbour}th nearest neighbour" in shown
    assert f"{POOL_RATIO} times as many pairs" in shown
    assert f"the last {RECENT_EPISODES} episodes" in shown


def test_unpublished_tasks_and_wrong_names_are_told(capsys, monkeypatch):
    assert "Nobody has published numbers for dm_control/cheetah-run" in _shown(
        capsys, monkeypatch, "--env", "dm_control/cheetah-run"
    )
    printed = _shown(capsys, monkeypatch, "--preset", "paper", "--env", BUTTON, "--algorithm", "oracle")
    assert printed == command_line(preset(BUTTON, "oracle", "paper")) + "\n"
    for arguments, message in (
        (["--algorithm", "pebbles"], "Unknown algorithm 'pebbles': did you mean pebble?"),
        (["--preset", "papers"], "Unknown preset 'papers': did you mean paper?"),
    ):
        assert cli.main(["presets", *arguments]) == 1
        assert capsys.readouterr().err == f"parl: {message}\n"


def test_train_takes_a_published_budget_with_its_session_size(capsys, monkeypatch):
    begun = []
    monkeypatch.setattr("parl_core.training.train.train", lambda config, *_: begun.append(config))
    train = ["train", "--env", WALKER, "--algorithm", "pebble", "--preset", "paper"]
    assert cli.main([*train, "--labels", "100"]) == 0
    assert cli.main([*train, "--labels", "500", "--reward.labels-per-session", "25"]) == 0
    found = [(config.reward.label_budget, config.reward.labels_per_session) for config in begun]
    assert found == [(100, 10), (500, 25)]
    assert cli.main([*train, "--labels", "200"]) == 1
    assert "on dm_control/walker-walk 100, 500, 1000, got 200" in capsys.readouterr().err
    assert len(begun) == 2
