"""Test files that pass, fail, crash, hang, or need what is not installed, each in its process."""

from __future__ import annotations

import time

import pytest

from benchmarks.gpu.store import ROOT, Store
from benchmarks.gpu.tests import Outcome, gpu_test_files, red, run_tests, untested

BODIES = {
    "passes": "def test_one(): pass\ndef test_two(): pass",
    "fails": "def test_one(): pass\ndef test_two(): assert 1 == 2, 'no'",
    "crashes": "import os, signal\ndef test_one(): pass\ndef test_two(): os.kill(os.getpid(), signal.SIGSEGV)",
    "hangs": "import time\ndef test_one(): time.sleep(600)",
    "needs": "import hypothesis_of_nobody\ndef test_one(): pass",
    "lacks": "import parl_core.nothing\ndef test_one(): pass",
    "skips": "import pytest\n@pytest.mark.skip(reason='no GPU')\ndef test_one(): pass\ndef test_two(): pass",
}


@pytest.fixture
def run(tmp_path):
    """Runs the bodies of these names; returns outcomes by name."""

    def runner(*names, seconds=100.0, timeout=60.0):
        files = []
        for name in names:
            path = tmp_path / f"test_{name}.py"
            path.write_text(BODIES[name])
            files.append(str(path))
        store = Store(tmp_path / "work", "key")
        outcomes = run_tests(files, store, time.monotonic() + seconds, lambda line: None, timeout)
        return {file.rpartition("test_")[2].removesuffix(".py"): outcome for file, outcome in outcomes.items()}

    return runner


def test_every_fate(run):
    found = run("passes", "fails", "crashes", "needs", "lacks", "skips")
    assert (found["passes"].passed, found["passes"].failed) == (2, [])
    assert found["fails"].passed == 1 and "test_two: AssertionError: no" in found["fails"].failed[0]
    assert "pytest ended with status -11" in found["crashes"].failed[0]
    assert found["needs"].skipped == {"hypothesis_of_nobody is not installed": 1} and not found["needs"].failed
    assert found["lacks"].failed  # what is ours must be there
    assert (found["skips"].passed, found["skips"].skipped) == (1, {"no GPU": 1})


def test_what_hangs_fails_and_the_end_of_the_time_does_not(run):
    assert "not over after" in run("hangs", timeout=3.0)["hangs"].failed[0]
    assert run("hangs", seconds=3.0) == {}


def test_green_files_are_not_run_again(run, monkeypatch):
    run("passes", "fails")
    monkeypatch.setitem(BODIES, "passes", "def test_one(): assert False")
    monkeypatch.setitem(BODIES, "fails", "def test_one(): pass")
    found = run("passes", "fails")
    assert not found["passes"].failed and not found["fails"].failed


def test_red_files_are_those_that_a_case_is_about():
    outcomes = {
        "tests/ops/test_gae.py": Outcome("tests/ops/test_gae.py", failed=["x"]),
        "tests/scan/test_vtrace.py": Outcome("tests/scan/test_vtrace.py", failed=["x"]),
        "tests/kernels/test_triton_scan.py": Outcome("tests/kernels/test_triton_scan.py"),
    }
    assert red(outcomes, ("gae", "scan")) == ["tests/ops/test_gae.py"]


def test_files_of_which_no_test_was_run():
    """Neither one that was left for want of time nor one of which everything was skipped is green."""
    names = [f"tests/test_gae_{fate}.py" for fate in ("green", "red", "skipped", "left")]
    outcomes = {
        names[0]: Outcome(names[0], passed=1, skipped={"no": 3}),
        names[1]: Outcome(names[1], failed=["x"]),
        names[2]: Outcome(names[2], skipped={"hypothesis is not installed": 1}),
    }
    assert untested([*names, "tests/test_scan.py"], outcomes, ("gae",)) == names[2:]


def test_files_are_those_of_kernels_ops_and_whatever_asks_for_a_device():
    files = gpu_test_files()
    assert len(files) == len(set(files)) and all((ROOT / file).is_file() for file in files)
    assert {"tests/ops/test_gae.py", "tests/benchmarks/test_gpu_device.py"} <= set(files)
    assert "tests/test_readme.py" not in files
