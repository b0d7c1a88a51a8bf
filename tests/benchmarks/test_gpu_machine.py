"""What is told of the machine: by a driver that is a script here, and by a worker that measures the floors."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch

from benchmarks.gpu import machine
from benchmarks.gpu.case import Lab
from benchmarks.gpu.contests import measure_machine
from benchmarks.gpu.store import Store
from benchmarks.harness.device import HostClock


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Makes `nvidia-smi` a script."""

    def make(body):
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return make


def test_clocks_are_read_when_the_floors_were_measured(driver):
    driver("echo 'NVIDIA H200, 575.57, 1980 MHz, 3201 MHz, 1980 MHz, 3201 MHz, 412.00 W'")
    found = machine.measure(Lab(torch.device("cpu"), HostClock(1e-4)))
    assert (found["driver_version"], found["clocks_sm"], found["power_draw"]) == ("575.57", "1980 MHz", "412.00 W")
    assert found["copy_bytes_per_s"] > 0 and json.dumps(found)
    assert "clocks_sm" not in machine.describe()  # by then it idles


def test_a_driver_that_does_not_answer_is_not_waited_for(driver, monkeypatch):
    driver("exec sleep 60")
    monkeypatch.setattr(machine, "_PATIENCE", 0.2)
    start = time.monotonic()
    assert machine._told_by_driver() == {} and time.monotonic() - start < 30


def test_floors_are_those_of_this_run(tmp_path):
    store, count = Store(tmp_path / "work", "key"), tmp_path / "count"
    code = f"import json; file = open({str(count)!r}, 'a+'); file.write('x'); file.seek(0)\n"
    code += "print(json.dumps({'launch_s': len(file.read())}))"
    for run in (1, 2):
        found = measure_machine(store, time.monotonic() + 60, dry=True, worker=(sys.executable, "-c", code))
        assert found == {"launch_s": run}
