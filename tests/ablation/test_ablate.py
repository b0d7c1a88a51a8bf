"""The ablation of the implicit term's curvature, and the measurement of how well each is aligned."""

from __future__ import annotations

import csv
import pickle
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from parl_core import cli
from parl_core.ablation import ablate
from parl_core.ablation.alignment import PAIRS_PER_SEGMENT, AlignmentProbe, cosine, fresh_segments
from parl_core.envs.vector import SerialEnvironments
from parl_core.models.policies import GaussianPolicy
from parl_core.preference.teachers import TEACHERS, ScriptedTeacher
from parl_core.rl.rollout import EpisodeStore, Segments
from parl_core.training.config import ImplicitConfig
from parl_core.training.trainer import SessionEnded, Trainer
from parl_core.workers import do_tasks
from tests.test_cli import TINY, fails, replace_environments
from tests.training.point_mass import PointMass, tiny_config

REFERENCE_STEPS = 200


@pytest.fixture
def point_mass(monkeypatch):
    replace_environments(monkeypatch, PointMass)
    monkeypatch.setattr(ablate, "make_env", PointMass)


@pytest.fixture
def here(monkeypatch):
    """The runs are done in this process."""
    monkeypatch.setattr(ablate, "run_tasks", lambda work, tasks, jobs, heard: do_tasks(work, tasks, heard))
    monkeypatch.setattr(ablate, "REFERENCE_STEPS", REFERENCE_STEPS)


def read(path) -> list[dict[str, str]]:
    with open(path) as file:
        return list(csv.DictReader(file))


def point_masses(seeds) -> SerialEnvironments:
    return SerialEnvironments([PointMass("point-mass", seed) for seed in seeds])


def trainer_of(config) -> Trainer:
    return Trainer(config, point_masses([1]), PointMass("point-mass", 2))


def trained(config) -> Trainer:
    trainer = trainer_of(config)
    for _ in trainer.run():
        pass
    return trainer


def test_the_command_reports_every_variant(point_mass, here, tmp_path, capsys):
    output = tmp_path / "ablation"
    tiny = [value if name != "--eval-interval" else "50" for name, value in zip(["", *TINY], TINY, strict=False)]
    command = ["ablate", "--env", "point-mass", "--seeds", "1", "--steps", "150", "--output", str(output), *tiny]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    rows = read(output / "results.csv")
    assert [row["variant"] for row in rows] == ["direct-only", "identity", "Fisher", "full-score"]
    assert all(row["variant"] in shown for row in rows)
    assert {row["seeds"] for row in rows} == {"1"}
    runs = read(output / "runs.csv")
    assert [(run["variant"], run["seed"]) for run in runs] == [(variant, "0") for variant in ablate.VARIANTS]
    curves = [read(ablate.run_path(output, "point-mass", variant, 0) / "metrics.csv") for variant in ablate.VARIANTS]
    for row, curve in zip(rows, curves, strict=True):
        returns = [float(point["true_return"]) for point in curve]
        assert float(row["last_return"]) == returns[-1]
        assert float(row["mean_return"]) == pytest.approx(sum(returns) / 3)
        assert row["last_return_se"] == ""
        assert returns[0] == float(curves[0][0]["true_return"])  # until the first session they are the same
    assert curves[0][-1]["implicit_to_direct"] == ""
    assert all(curve[-1]["implicit_to_direct"] != "" for curve in curves[1:])
    assert rows[0]["cosine_fisher"] == rows[0]["signal"] == rows[0]["seconds_per_refresh"] == ""
    for row in rows[1:]:
        assert -1 <= float(row["cosine_fisher"]) <= 1
        assert -1 <= float(row["cosine_score"]) <= 1
        assert float(row["seconds_per_refresh"]) > 0
    alignments = read(output / "alignments.csv")
    assert {(one["session"], one["curvature"]) for one in alignments} == {
        ("1", curvature) for curvature in ("identity", "fisher", "score")
    }
    page = (output / "table.md").read_text()
    assert page.startswith("    parl ablate --env point-mass")
    assert "| full-score" in page
    assert (output / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert "is not empty" in fails(capsys, *command)


@pytest.mark.parametrize("option", [["--algorithm", "pebble"], ["--implicit.curvature", "score"]])
def test_what_the_ablation_goes_through_cannot_be_set(capsys, tmp_path, option):
    assert option[0] in fails(capsys, "ablate", "--output", str(tmp_path / "new"), *option)


def test_the_work_travels_to_other_processes(tmp_path):
    pickle.dumps(partial(ablate.work, {"env": tiny_config()}, tmp_path))


def test_measuring_leaves_the_run_as_it_is(point_mass):
    config = tiny_config(implicit=ImplicitConfig(curvature="none"))
    plain = trained(config)
    probed = trainer_of(config)
    probe = probe_of(probed, sessions=(0, 2))
    probed.upper.implicit = probe
    for _ in probed.run():
        pass
    assert {one.session for one in probe.found} == {0, 2}
    for one, other in zip(plain.upper.reward.parameters(), probed.upper.reward.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(plain.agent.actor.parameters(), probed.agent.actor.parameters(), strict=True):
        assert torch.equal(one, other)


def test_without_implicit_term_and_on_policy_queries_a_parl_is_pebble():
    config = tiny_config(implicit=ImplicitConfig(curvature="none", on_policy_share=0.0))
    a_parl, pebble = trained(config), trained(replace(config, algorithm="pebble"))
    for one, other in zip(a_parl.upper.reward.parameters(), pebble.upper.reward.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(a_parl.agent.actor.parameters(), pebble.agent.actor.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("changes", [{}, {"label_budget": 100}, {"session_interval": 500}])
def test_the_number_of_sessions_is_foretold(changes):
    config = tiny_config("pebble")
    config = replace(config, reward=replace(config.reward, **changes))
    trainer = trainer_of(config)
    assert ablate.num_sessions(config) == sum(isinstance(event, SessionEnded) for event in trainer.run())


def test_sessions_are_measured_evenly():
    assert ablate.evenly(1, 19, 5) == [1, 6, 10, 14, 19]
    assert ablate.evenly(1, 3, 5) == [1, 2, 3]
    assert ablate.evenly(0, 0, 5) == [0]


def probe_of(trainer: Trainer, utility: str = "likelihood", sessions: tuple[int, ...] = ()) -> AlignmentProbe:
    return AlignmentProbe(
        ImplicitConfig(utility=utility),
        0.9,
        curvatures=("identity", "fisher"),
        sessions=sessions,
        env=PointMass("three", 3),
        label=ScriptedTeacher(TEACHERS["oracle"], segment_length=5, horizon=25, generator=torch.Generator()).label,
        episodes=trainer.upper.episodes,
        reference_steps=REFERENCE_STEPS,
        generator=torch.Generator().manual_seed(0),
    )


def test_fresh_segments_are_the_policys():
    """Its noise, recovered from 5000 actions, is standard normal; mean and variance are off by 4.5 σ once in 10⁵ seeds."""
    torch.manual_seed(0)
    policy = GaussianPolicy(2, 1, (4,), squash=True)
    segments = fresh_segments(policy, PointMass("one", 1), 5000, 5, torch.Generator().manual_seed(0))
    assert segments.observations.shape == (1000, 5, 2)
    with torch.no_grad():
        mean, log_std = policy.mean_and_log_std(segments.observations.flatten(0, 1))
    noise = (torch.atanh(segments.actions.flatten(0, 1)) - mean) / log_std.exp()
    assert abs(float(noise.mean())) < 4.5 / 5000**0.5
    assert abs(float(noise.var()) - 1) < 4.5 * (2 / 5000) ** 0.5


@pytest.mark.parametrize("utility", ["likelihood", "win-rate"])
def test_pairs_of_the_reference_have_every_fresh_segment_as_often(utility):
    trainer = trainer_of(tiny_config())
    trainer.upper.episodes = EpisodeStore(4, 2, 1)
    for _ in range(20):
        trainer.upper.episodes.add(np.full(2, -7.0), np.zeros(1), -7.0)
    trainer.upper.episodes.end_episode()
    fresh = Segments(torch.arange(30.0).view(3, 5, 2), torch.zeros(3, 5, 1), torch.arange(15.0).view(3, 5))
    pairs = probe_of(trainer)._pairs(fresh, utility == "win-rate")
    assert pairs.num_pairs == 3 * PAIRS_PER_SEGMENT
    second = pairs.second.observations.view(-1, 5, 2)
    for one in fresh.observations:
        assert int((second == one).all(dim=(1, 2)).sum()) == PAIRS_PER_SEGMENT
    first = pairs.first.observations.view(-1, 5, 2)
    assert bool((first == -7).all()) == (utility == "win-rate")
    margins = second.sum((1, 2)) - first.sum((1, 2))
    assert torch.equal(pairs.labels, 0.5 + 0.5 * margins.sign())


def test_cosines():
    assert cosine(torch.tensor([1.0, 0]), torch.tensor([1.0, 1])) == pytest.approx(0.5**0.5)
    assert cosine(torch.zeros(2), torch.ones(2)) == 0


def test_the_summary_is_means_and_standard_errors():
    runs = [
        {"env": "e", "variant": variant, "seed": seed, "last_return": 10.0 * seed, "mean_return": 1.0, "seconds": 3.0}
        for variant in ablate.VARIANTS
        for seed in range(3)
    ]
    alignments = [
        {"env": "e", "curvature": "fisher", "session": n, "cosine_fisher": c, "cosine_score": 0.5, "signal": c,
         "to_direct": 10.0**n, "seconds": 0.5, "reliability_fisher": 0.8, "reliability_score": 0.6}
        for n, c in enumerate((0.1, 0.2, 0.6))
    ]  # fmt: skip
    rows = {row["variant"]: row for row in ablate.summarise(runs, alignments)}
    assert rows["Fisher"]["last_return"] == 10
    assert rows["Fisher"]["last_return_se"] == pytest.approx(10 / 3**0.5)
    assert rows["Fisher"]["cosine_fisher"] == pytest.approx(0.3)
    assert rows["Fisher"]["cosine_fisher_se"] == pytest.approx((0.07 / 3) ** 0.5)
    assert rows["Fisher"]["to_direct"] == 10
    assert rows["direct-only"]["snapshots"] == 0
    assert rows["direct-only"]["cosine_fisher"] is None
    made = ablate.table("e", list(rows.values()), alignments)
    assert made.rows[2][:4] == ("Fisher", "10 ± 5.77", "1 ± 0", "0.3 ± 0.153")
    assert "0.8 ± 0" in made.note
