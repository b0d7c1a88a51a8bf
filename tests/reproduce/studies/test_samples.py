"""The study of environment steps at small settings, and its counting by hand."""

import numpy as np
import pytest

from parl_core.envs.tabular import FourRooms, nudged_contrast
from parl_core.envs.tabular.problems.four_rooms_ascent import initial_weights
from parl_core.reproduce.studies import samples
from parl_core.reproduce.studies.samples import SamplesStudy


def _rows(cosines, name="HPGD", temperature=0.001, where="start", seed=0):
    return [
        {
            "temperature": temperature,
            "where": where,
            "seed": seed,
            "estimator": name,
            "env_steps": steps,
            "cosine": cosine,
        }
        for steps, cosine in zip((500, 1000, 2000, 4000), cosines, strict=True)
    ]


@pytest.mark.parametrize(
    ("cosines", "needed"),
    [
        ((0.1, 0.5, 0.96, 0.99), 2000),
        ((0.96, 0.5, 0.96, 0.99), 2000),  # it has to stay
        ((0.96, 0.97, 0.96, 0.99), 500),
        ((0.96, 0.97, 0.96, 0.9), np.inf),
        ((0.1, 0.97, float("nan"), 0.99), 4000),
    ],
)
def test_steps_that_were_needed(cosines, needed):
    assert samples.steps_needed(list(zip((500, 1000, 2000, 4000), cosines, strict=True)), 0.95) == needed


def test_a_task_gives_every_estimator_at_every_budget():
    study = SamplesStudy(seeds=1, most_steps=16_000)
    rows = study.run({"temperature": 0.005, "where": "start", "seed": 0})["cosines"]
    names = {row["estimator"] for row in rows}
    assert names == {*samples.FROM_EPISODES, *samples.CONTRASTS, "ZeroOrder", "DirectOnly"}
    assert max(row["env_steps"] for row in rows) == 16_000 and all(-1 <= row["cosine"] <= 1 for row in rows)
    last = {row["estimator"]: row["cosine"] for row in rows if row["env_steps"] == 16_000}
    assert last["CertaintyEquivalent"] > 0.9 > last["SoBiRL"]
    assert rows == study.run({"temperature": 0.005, "where": "start", "seed": 0})["cosines"]


def test_contrasts_of_many_episodes_are_the_exact_ones():
    weights, problem = initial_weights(0), FourRooms(1, 0.005, 1.0)
    exact = problem.hypergradient(weights, nudged_contrast, penalty=1 / 0.005).total
    above, below = samples._nudged(problem, weights, "NudgedContrast", 2_000_000, 0)
    estimate = samples._contrast(problem, weights, "NudgedContrast", above, below)
    assert estimate @ exact / np.linalg.norm(estimate) / np.linalg.norm(exact) > 0.8


def test_table_and_ratio(tmp_path):
    study = SamplesStudy(seeds=1, most_steps=4000)
    rows = []
    for temperature in samples.TEMPERATURES:
        for where in ("start", "after 1000 steps"):
            rows += _rows((0.1, 0.97, 0.96, 0.99), "CertaintyEquivalent", temperature, where)
            rows += _rows((0.1, 0.5, 0.6, 0.99 if where == "start" else 0.5), "HPGD", temperature, where)
    (table,) = study.tables({"cosines": rows})
    assert table.rows[0] == ("CertaintyEquivalent", *["1,000"] * 6)
    assert table.rows[1] == ("HPGD", *["4,000", "> 4,000"] * 3)
    assert table.rows[2][1:] == ("4.0", "not reached by HPGD") * 3
    (figure,) = study.figures({"cosines": rows}, tmp_path)
    assert figure.stat().st_size > 10_000
