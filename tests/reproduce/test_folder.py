"""The result folder: what goes into a CSV comes out again, and no folder is used for what it is not."""

from __future__ import annotations

import errno
import json
import math
import os
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parl_core import provenance
from parl_core.errors import ConfigError, RunFolderError
from parl_core.reproduce.csv_files import plain_rows, read_csv, write_csv
from parl_core.reproduce.folder import StudyFolder, read_record, read_results
from parl_core.workers import Finished
from tests.reproduce.tiny import Tiny

HERE = {
    **provenance.describe_environment(),
    "commit": "c0",
    "dirty": False,
    "command": "parl reproduce tiny",
    "jobs": 1,
}
CELLS = st.one_of(
    st.integers(),
    st.floats(),
    st.booleans(),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.sampled_from(["nan", "1e5", "-inf", "True", " 1", "1_0", "0x1", "1.", "+1", '"', "a,b", "", "١"]),
)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4).flatmap(lambda width: st.lists(st.tuples(*[CELLS] * width), max_size=4)))
def test_rows_come_back_as_they_were_or_are_refused(tmp_path_factory, lines):
    rows = [{f"c{number}": value for number, value in enumerate(line)} for line in lines]
    path = tmp_path_factory.getbasetemp() / "round_trip.csv"
    try:
        rows = plain_rows({"kind": rows})["kind"]
    except ValueError:
        strings = [cell for line in lines for cell in line if isinstance(cell, str)]
        assert any(set(cell) & set("\r\n\0") or _reads_as_number(cell) for cell in strings)
        return
    write_csv(path, rows)
    assert repr(read_csv(path)) == repr(rows)  # NaN is not equal to itself, 1 and True and 1.0 are to each other


def _reads_as_number(cell):
    try:
        float(cell)
    except ValueError:
        return cell in ("True", "False")
    return True


def test_numpys_numbers_become_pythons():
    row = {"a": np.float64(0.1), "b": np.int32(3), "c": np.bool_(True), "d": np.float32(0.1), "e": "x"}
    (line,) = plain_rows({"kind": [row]})["kind"]
    assert [(type(value), value) for value in line.values()] == [
        (float, 0.1),
        (int, 3),
        (bool, True),
        (float, 0.10000000149011612),
        (str, "x"),
    ]


def test_rows_that_no_csv_can_hold_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"kind\.a must be a str, int, float or bool, got NoneType"):
        plain_rows({"kind": [{"a": None}]})
    with pytest.raises(
        ValueError, match=r"kind\.a must be one line that does not read as a number or a bool, got '1e5'"
    ):
        plain_rows({"kind": [{"a": "1e5"}]})
    for text in ("a\rb", "a\nb", "a\0b"):
        with pytest.raises(ValueError, match="must be one line"):
            plain_rows({"kind": [{"a": text}]})
    with pytest.raises(ValueError, match=r"row of kind must have the columns \['a'\], got \['b'\]"):
        plain_rows({"kind": [{"a": 1}, {"b": 1}]})
    (tmp_path / "broken.csv").write_text("a,b\n1\n")
    with pytest.raises(RunFolderError, match="must have 2 cells in every line"):
        read_csv(tmp_path / "broken.csv")
    with pytest.raises(RunFolderError, match="cannot be read"):
        read_csv(tmp_path / "none.csv")


def fill(path, study, seeds, here=HERE):
    """Work on a folder until these seeds are done."""
    folder = StudyFolder.open(path, study)
    folder.begin(here)
    for number, task in enumerate(task for task in study.tasks() if task["seed"] in seeds):
        folder.add(Finished(task, {"kind": [{"seed": task["seed"], "x": math.nan}]}, 2.0), 10.0 * (number + 1))
    return folder


def test_every_sitting_that_did_a_task_is_recorded_and_no_other(tmp_path):
    fill(tmp_path, Tiny(), {0, 1}, {**HERE, "cpu": "one", "jobs": 2}).close()
    fill(tmp_path, Tiny(), {4}, {**HERE, "cpu": "two", "commit": None, "dirty": None}).close()
    fill(tmp_path, Tiny(), set(), {**HERE, "cpu": "idle"}).close()
    fill(tmp_path, Tiny(), {2, 3, 5}, {**HERE, "cpu": "one"}).close()
    folder = fill(tmp_path, Tiny(), set(), {**HERE, "cpu": "idle", "command": "parl reproduce tiny --jobs 3"})
    folder.finish(Tiny().tasks())
    folder.close()
    command, sittings, rows = read_record(tmp_path)
    assert command == "parl reproduce tiny --jobs 3"
    assert [(one.environment["cpu"], one.jobs, one.tasks, one.wall_seconds) for one in sittings] == [
        ("one", 2, 2, 20.0),
        ("two", 1, 1, 10.0),
        ("one", 1, 3, 30.0),
    ]
    assert sittings[1].environment["commit"] is sittings[1].environment["dirty"] is None
    assert set(sittings[0].environment) == provenance.FACTS
    assert rows == {"kind": 6}
    assert json.loads((tmp_path / "environment.json").read_text())["task_seconds"] == 12.0
    assert [row["seed"] for row in read_csv(tmp_path / "kind.csv")] == list(range(6))


def test_of_two_commands_that_begin_a_folder_at_once_one_is_refused(tmp_path, monkeypatch):
    listdir, refused = os.listdir, []

    def meanwhile(path):
        monkeypatch.setattr(os, "listdir", listdir)
        names = listdir(path)
        with pytest.raises(RunFolderError, match="in use by another") as told:
            StudyFolder.open(tmp_path, Tiny(size=7))
        refused.append(told)
        return names

    monkeypatch.setattr(os, "listdir", meanwhile)
    folder = StudyFolder.open(tmp_path, Tiny())
    assert len(refused) == 1
    assert json.loads((tmp_path / "settings.json").read_text())["settings"]["size"] == 6
    folder.close()
    StudyFolder.open(tmp_path, Tiny()).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["progress.jsonl", "settings.json"]


def test_a_folder_that_was_refused_is_not_kept_locked(tmp_path):
    fill(tmp_path, Tiny(), {0}).close()
    with pytest.raises(ConfigError) as told:  # which holds on to all that the call had
        StudyFolder.open(tmp_path, Tiny(size=7))
    StudyFolder.open(tmp_path, Tiny()).close()
    assert "remove it, or choose another --output" in str(told.value)


def test_where_folders_cannot_be_locked_none_is_used(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as context:
        context.setattr("fcntl.flock", flock)
        with pytest.raises(RunFolderError, match=r"cannot be locked \(No locks available\)"):
            StudyFolder.open(tmp_path, Tiny())
        assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(RunFolderError, match="needs a POSIX system"):
        StudyFolder.open(tmp_path / "new", Tiny())
    assert not (tmp_path / "new").exists()


def test_other_settings_are_refused_by_name(tmp_path):
    fill(tmp_path, Tiny(), {0}).close()
    before = (tmp_path / "progress.jsonl").read_bytes()
    with pytest.raises(ConfigError) as told:
        StudyFolder.open(tmp_path, Tiny(size=7, factors=(1.0,)))
    assert "size = 7 (it was 6), factors = [1.0] (it was [1.0, 0.5]);" in str(told.value)
    assert "hold" not in str(told.value)
    assert (tmp_path / "progress.jsonl").read_bytes() == before


def test_another_study_another_version_and_foreign_folders_are_refused(tmp_path, monkeypatch):
    class Other(Tiny):
        name = "other"

    run = tmp_path / "run"
    fill(run, Tiny(), {0}).close()
    with pytest.raises(RunFolderError, match="holds the study tiny"):
        StudyFolder.open(run, Other())
    with monkeypatch.context() as context:
        context.setattr("parl_core.reproduce.folder.__version__", "9.9")
        with pytest.raises(ConfigError, match=r"begun by parl-core .* and this is 9\.9"):
            StudyFolder.open(run, Tiny())
        (run / "environment.json").write_text("{}")
        StudyFolder.open(run, Tiny()).close()  # complete: nothing would be mixed
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("precious")
    with pytest.raises(RunFolderError, match="not empty and no folder of parl reproduce"):
        StudyFolder.open(tmp_path / "thesis", Tiny())
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter"]
    with pytest.raises(RunFolderError, match="Cannot make the folder"):
        StudyFolder.open(tmp_path / "thesis" / "chapter", Tiny())
    (tmp_path / "thesis" / "settings.json").write_text("[1]")
    with pytest.raises(RunFolderError, match="none of parl reproduce"):
        StudyFolder.open(tmp_path / "thesis", Tiny())


def test_a_folder_killed_before_its_settings_were_whole_is_begun_anew(tmp_path):
    (tmp_path / "settings.json.partial").write_text("{")
    StudyFolder.open(tmp_path, Tiny()).close()
    assert json.loads((tmp_path / "settings.json").read_text())["settings"]["size"] == 6


def test_a_damaged_line_is_told_by_its_number(tmp_path):
    fill(tmp_path, Tiny(), {0, 1}).close()
    lines = (tmp_path / "progress.jsonl").read_text().splitlines()
    lines[1] = lines[1][:-5]
    (tmp_path / "progress.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(RunFolderError, match="damaged in line 2: delete it and all lines after it"):
        StudyFolder.open(tmp_path, Tiny())
    lines[0] = '{"environment": {"commit": null}}'
    (tmp_path / "progress.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(RunFolderError, match="damaged in line 1:"):
        StudyFolder.open(tmp_path, Tiny())


def test_results_are_read_back_only_when_whole(tmp_path):
    with pytest.raises(RunFolderError, match="has no settings"):
        read_results(tmp_path)
    folder = fill(tmp_path, Tiny(), set(range(6)))
    with pytest.raises(RunFolderError, match="not complete"):
        read_results(tmp_path)
    folder.finish(Tiny().tasks())
    with pytest.raises(RunFolderError, match=r"figures\.json is missing: the folder's parl reproduce draws it again"):
        read_results(tmp_path)
    folder.name_figures([tmp_path / "a.png"])
    folder.close()
    with pytest.raises(RunFolderError, match=r"a\.png is missing"):
        read_results(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    results = read_results(tmp_path)
    assert (results.study, results.settings["factors"]) == ("tiny", [1.0, 0.5])
    assert len(results.rows["kind"]) == 6
    whole = (tmp_path / "kind.csv").read_text()
    (tmp_path / "kind.csv").write_text(whole.rsplit("\n", 2)[0] + "\n")
    with pytest.raises(RunFolderError, match="must have the 6 rows it was written with, got 5"):
        read_results(tmp_path)


@pytest.mark.parametrize("change", [dict(sittings=[]), dict(sittings=[1]), dict(sittings=[{"jobs": 1}]), dict(rows=3)])
def test_a_record_of_another_shape_is_told_in_one_sentence(tmp_path, change):
    folder = fill(tmp_path, Tiny(), set(range(6)))
    folder.finish(Tiny().tasks())
    folder.name_figures([])
    folder.close()
    written = json.loads((tmp_path / "environment.json").read_text())
    less = [{**written["sittings"][0], "environment": {"commit": None}}]
    for data in ({}, [], 3, {**written, **change}, {**written, "sittings": less}):
        (tmp_path / "environment.json").write_text(json.dumps(data))
        with pytest.raises(RunFolderError, match=r"environment\.json is not as this parl reproduce writes it: remove"):
            read_results(tmp_path)
