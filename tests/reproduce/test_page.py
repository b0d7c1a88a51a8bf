"""The results page is made of the folders alone, and is what is committed."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from parl_core.errors import RunFolderError, UnknownNameError
from parl_core.reproduce import registry
from parl_core.reproduce.folder import study_of
from parl_core.reproduce.page import default_folders, find_folders, page, write_page
from tests.reproduce import tiny
from tests.reproduce.test_runner import run
from tests.reproduce.tiny import Tiny

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Results of the tiny study, which is known for the time of the test, below others in the list."""
    monkeypatch.setitem(registry._STUDIES, "tiny", registry._Entry("tiny", "Tiny", "squares"))
    monkeypatch.setitem(sys.modules, "parl_core.reproduce.studies.tiny", tiny)
    path = tmp_path / "docs" / "results" / "a run"
    run(Tiny(), path)
    (path / "progress.jsonl").unlink()
    return path


def test_the_page_holds_everything_and_its_links_lead_to_files(folder):
    output = write_page([folder], folder.parents[1] / "results.md")
    text = output.read_text()
    for part in (
        "## Tiny | study\n\nPublished: nowhere\n\n    parl reproduce tiny\n",
        "Settings: size 6, factors 1.0 0.5.",
        "torch 2.",
        "1 process: 6 tasks in ",
        "**Squares**\n\n| seed | square |\n| ---: | -----: |\n|    0 |  0.000 |",
        "A | note.",
    ):
        assert part in text
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links == [f"results/a%20run/{name}" for name in ("b.png", "a.png", "squares.csv", "odd.csv")]
    assert all((output.parent / link.replace("%20", " ")).exists() for link in links)


def test_the_same_folders_give_the_same_bytes_wherever_they_are(folder, tmp_path):
    first = page([folder], tmp_path / "docs")
    moved = tmp_path / "elsewhere" / "docs" / "results" / "a run"
    shutil.copytree(folder, moved)
    assert page([moved], tmp_path / "elsewhere" / "docs") == first


def test_all_sittings_are_named_in_their_order(folder):
    path = folder / "environment.json"
    data = json.loads(path.read_text())
    first = {
        **{"commit": None, "dirty": None, "date": "2030-01-02", "parl_core": "1.0", "python": "3.12.1", "numpy": "2.1"},
        **{"torch": "2.13", "numba": None, "cpu": None},
    }
    second = {**first, "commit": "b" * 40, "dirty": True, "date": "2030-01-01", "numba": "0.61", "cpu": "Fast"}
    third = {**second, "commit": "a" * 40, "dirty": False, "torch": "2.14"}
    data["sittings"] = [
        {"environment": first, "jobs": 2, "tasks": 1, "wall_seconds": 50.0},
        {"environment": second, "jobs": 1, "tasks": 2, "wall_seconds": 9.0},
        {"environment": third, "jobs": 2, "tasks": 3, "wall_seconds": 8.4},
    ]
    path.write_text(json.dumps(data))
    assert (
        f"2030-01-02 and 2030-01-01, parl-core 1.0 at an unknown commit and commit {'b' * 12} and commit {'a' * 12} with "
        "uncommitted changes; Python 3.12.1, NumPy 2.1, torch 2.13 and 2.14, numba none and 0.61; processor unknown and "
        "Fast, 2 and 1 processes: 6 tasks in 1 min 7 s. Settings: size 6,"
    ) in page([folder], folder.parents[1])


def test_settings_make_the_study_they_were_written_from(folder):
    study = Tiny(size=3, factors=(2.0,), trouble="x")
    settings = json.loads(json.dumps(asdict(study)))
    assert registry.study_from_settings("tiny", settings) == study


def test_folders_are_found_in_the_order_of_the_studies(folder, monkeypatch):
    root = folder.parent
    monkeypatch.setitem(registry._STUDIES, "alpha", registry._Entry("tiny", "Tiny", "listed last"))
    for name, study in (("0", "alpha"), ("z", "rand-mdp"), ("b", "tiny"), ("unknown", "no-such"), ("broken", None)):
        (root / name).mkdir()
        (root / name / "settings.json").write_text("[" if study is None else f'{{"study": "{study}"}}')
    (root / "walker-walk").mkdir()
    assert [path.name for path in find_folders(root)] == ["z", "a run", "b", "0"]
    assert find_folders(root / "walker-walk") == []


def test_without_folders_those_that_are_kept_are_shown_else_those_that_were_made_here(folder, tmp_path, monkeypatch):
    made = tmp_path / "runs" / "reproduce" / "tiny"
    shutil.copytree(folder, made)
    monkeypatch.chdir(tmp_path)
    assert default_folders() == (Path("docs/results"), (Path("docs/results/a run"),))
    (folder / "settings.json").unlink()  # now it is a folder of something else
    assert default_folders() == (Path("runs/reproduce"), (Path("runs/reproduce/tiny"),))
    shutil.rmtree(made)
    with pytest.raises(RunFolderError, match="neither docs/results nor runs/reproduce holds a result folder"):
        default_folders()


def test_folders_that_make_no_page_are_refused(folder, tmp_path):
    with pytest.raises(RunFolderError, match="no settings"):
        write_page([tmp_path], tmp_path / "page.md")
    settings = (folder / "settings.json").read_text()
    (folder / "settings.json").write_text(settings.replace('"tiny"', '"tyni"'))
    with pytest.raises(UnknownNameError, match="did you mean tiny"):
        write_page([folder], tmp_path / "page.md")
    (folder / "settings.json").write_text(settings.replace('"size"', '"sizes"'))
    with pytest.raises(RunFolderError, match="settings that tiny does not have"):
        write_page([folder], tmp_path / "page.md")
    assert not (tmp_path / "page.md").exists()


def test_the_committed_page_is_that_of_the_committed_folders_of_all_studies():
    folders = find_folders(DOCS / "results")
    assert [study_of(folder) for folder in folders] == list(registry.study_names())
    assert (DOCS / "results.md").read_text() == page(folders, DOCS), "make it again: parl reproduce page"
