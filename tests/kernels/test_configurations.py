"""Every configuration that autotuning may choose is right: other tests may run with the first alone."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch

from tests.ops.ragged import offsets_of

pytest.importorskip("triton")
from tests.kernels import test_triton_preference as preference
from tests.kernels import test_triton_scan as scans


def scan(device):
    lengths = [3, 0, scans.BLOCK + 1, scans.SIZES.long + 5, 1]
    offsets = offsets_of(lengths)
    scans.check(lengths, torch.float32, device, offsets, offsets.to(device))


def preference_loss(device):
    preference.test_ragged(device, None, [3, 0, preference.BLOCK + 1, 5], torch.float32)


CHECKS = {"scan": scan, "preference": preference_loss}


def tuned(module):
    """Kernels that are tuned, each with all of its configurations, whatever part of them it was given here."""
    lists = [value for value in vars(module).values() if isinstance(value, list)]
    for kernel in vars(module).values():
        if type(kernel).__name__ == "Autotuner":
            yield kernel, next(configs for configs in lists if kernel.configs[0] in configs)


CASES = [
    (name, number)
    for name in CHECKS
    for number in range(
        max(len(configs) for _, configs in tuned(importlib.import_module(f"parl_core.kernels.triton_{name}")))
    )
]


@pytest.mark.parametrize(("name", "number"), CASES)
def test_every_configuration(device, poisoned_memory, monkeypatch, name, number):
    for kernel, configs in tuned(importlib.import_module(f"parl_core.kernels.triton_{name}")):
        monkeypatch.setattr(kernel, "configs", [configs[number % len(configs)]])
    CHECKS[name](device)


@pytest.mark.parametrize(("untuned", "expected"), [("1", "1"), ("", "4")])
def test_tests_may_take_the_first(untuned, expected):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PARL_TRITON_UNTUNED": untuned}
    code = "from parl_core.kernels import triton_common as c; import triton\n"
    code += "print(len(c.autotune([triton.Config({})] * 4, [])(triton.jit(c.program.fn)).configs))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr
