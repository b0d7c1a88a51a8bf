"""Every listed study from the command to the page, at tiny settings."""

import io

import pytest
from rich.console import Console

from parl_core.reproduce.page import page
from parl_core.reproduce.registry import study_class, study_names
from parl_core.reproduce.runner import reproduce
from parl_core.reproduce.study import Study

TINY = {
    "four-rooms": {"seeds": 2, "pilot_seeds": 1, "steps": 50, "estimator": "exact"},
    "samples": {"seeds": 1, "most_steps": 2000},
    "rand-mdp": {"seeds": 2, "steps": 20},
    "convergence": {"seeds": 1, "steps": 20},
    "lemma1": {"draws": 25},
    "leaders": {"seeds": 1, "steps": 10},
}


def test_every_study_is_tried_here():
    assert set(TINY) == set(study_names())
    for name in study_names():
        study = study_class(name)
        assert issubclass(study, Study) and study.name == name and study.title and study.source


@pytest.mark.parametrize("name", TINY)
def test_a_study_goes_from_tasks_to_the_page(name, tmp_path):
    study = study_class(name)(**TINY[name])
    folder = tmp_path / name
    screen = io.StringIO()
    reproduce(study, folder, jobs=1, command=f"parl reproduce {name}", console=Console(file=screen, width=200))
    text = page([folder], tmp_path)
    assert f"## {study.title}" in text and f"parl reproduce {name}" in text
    for csv in folder.glob("*.csv"):
        assert f"({name}/{csv.name})" in text
    figures = list(folder.glob("*.png"))
    assert figures and all(f"({name}/{figure.name})" in text for figure in figures)
    for title in (line for line in text.splitlines() if line.startswith("**")):
        assert title.strip("*") in screen.getvalue()
