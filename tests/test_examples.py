"""The scripts in docs/examples do what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from parl_core import cli
from parl_core.training.run_folder import read_metrics

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_backward(capsys):
    """Of six seeds, main ended at .30 to .38, without the reward's steps at .61 to .66, and uphill at .82 to .89."""
    example = load("backward")
    for seed in range(3):
        without = example.main(seed, reward_lr=0.0)
        share = example.main(seed)
        assert share < 0.45 < 0.55 < without
        assert capsys.readouterr().out.endswith(f"worse than the first policy: {share:.0%}\n")


def test_surrogate():
    """With the line the loop ends near the minimum of the expected loss, found here by its exact gradient; without, not."""
    example = load("surrogate")
    table = torch.zeros(example.NUM_ACTIONS, requires_grad=True)
    optimizer = torch.optim.Adam([table], lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        loss = example.expected_loss(table)
        loss.backward()
        optimizer.step()
    assert example.main() == pytest.approx(loss.item(), abs=0.01)
    assert example.main(implicit=False) > loss.item() + 0.05


def test_implicit(capsys):
    outcome = load("implicit").main()
    assert outcome["error"] < 1e-8
    assert outcome["last"] < 0.7 * outcome["first"]
    assert outcome["useless"] > 10 * outcome["useful"]
    assert f"{outcome['error']:.1e}" in capsys.readouterr().out


def test_stackelberg(capsys):
    """Without commitment a parcel is opened as far as that pays for itself, with 40% smuggled, at a loss of .4."""
    found = load("stackelberg").main()
    assert found["total"] == pytest.approx(found["search"], abs=1e-5)
    assert found["direct"] == pytest.approx(-0.4, abs=1e-4)
    assert found["no commitment"] == pytest.approx(-0.4, abs=1e-3)
    assert f"{found['total']:.4f}" in capsys.readouterr().out


def test_own_environment(capsys):
    """800 steps of training; whatever the labels, standing still would earn about half."""
    random, last = load("own_environment").main()
    assert random < 10 < 14 < last
    assert f"{last:.1f} by the policy" in capsys.readouterr().out


def test_own_environment_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLES)
    _, command = load("own_environment").__doc__.split("parl train", 1)
    small = "--steps 300 --sac.hidden 8 8 --reward.hidden 8 --reward.max-epochs 2 --eval-episodes 1 --run-dir".split()
    assert cli.main(["train", *command.split(), *small, str(tmp_path / "run")]) == 0
    assert read_metrics(tmp_path / "run")[-1]["labels"] > 0


def test_own_environment_continues_an_episode():
    cart, other = (load("own_environment").Cart(seed) for seed in (0, 1))
    cart.reset()
    cart.step([0.5])
    other.set_state(cart.state())
    assert [other.step([0.1]), other.reset()] == [cart.step([0.1]), cart.reset()]


def test_own_labels(capsys):
    """The policy goes where the labels say, whatever the reward says, and a source may skip and call pairs equal."""
    example = load("own_labels")
    assert example.main() > 0.5
    assert "between -1 (left) and 1 (right)" in capsys.readouterr().out
    opposite = {"a": "b", "b": "a", "=": "?"}
    assert example.main(lambda question: opposite[example.likes_the_right(question)]) < -0.5
    answers = iter("ab=?")
    terminal = example.Terminal(lambda question: next(answers))
    labels = [terminal.answer(0.0, 1.0) for _ in range(4)]
    assert labels[:3] == [0.0, 1.0, 0.5] and labels[3] != labels[3]


def test_every_example_is_tested():
    tested = {name.removeprefix("test_") for name in globals()}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested
