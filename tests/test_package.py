"""The package as a whole: what importing it costs and drags in, and that its public names are there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import parl_core

HEAVY = "dm_control mujoco metaworld gymnasium matplotlib tyro rich tensorboard numba scipy safetensors pandas".split()


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_is_quick_and_light():
    code = f"""
import sys, time
import torch, numpy
before = set(sys.modules)
start = time.process_time()
import parl_core
from parl_core import *
from parl_core import ops, policies, rewards, hypergradient
took = time.process_time() - start
print(took, [name for name in {HEAVY!r} if name in sys.modules and name not in before])
"""
    results = [run(code).split(maxsplit=1) for _ in range(3)]
    assert all(heavy.strip() == "[]" for _, heavy in results)
    assert min(float(took) for took, _ in results) < 0.6  # .2 on a quiet machine; busy neighbours double CPU time


def test_the_engine_imports_no_environment_and_no_file():
    code = """
import sys
import parl_core.hypergrad
above = ("envs", "rl", "preference", "training", "comparison", "ablation", "reproduce", "commands")
print([m for m in sys.modules if m.startswith("parl_core.") and m.split(".")[1] in above])
"""
    assert run(code).strip() == "[]"


def test_the_engine_runs_with_torch_alone():
    code = """
import sys
for name in ("numpy", "numba", "scipy"):
    sys.modules[name] = None
import warnings
warnings.simplefilter("ignore")
import torch
import parl_core as parl
policy, reward = parl.policies.GaussianPolicy(3, 2, (4,)), parl.rewards.RewardEnsemble(3, 2, (4,))
data = parl.Trajectories(torch.randn(6, 3), torch.randn(6, 2), torch.tensor([0, 2, 6]))
pairs = parl.PreferencePairs(data, data, torch.tensor([0.0, 1.0]))
result = parl.hypergradient(
    policy, reward, data, pairs, loss=parl.PreferenceLoss(), discount=0.9, curvature=parl.Fisher(0.1, damping=0.1)
)
print(bool(torch.isfinite(result.total).all()), parl.available_backends())
"""
    assert run(code).startswith("True")


@pytest.mark.parametrize("name", parl_core.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(parl_core, name)
    assert value.__doc__
    assert name in dir(parl_core)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'hypergradeint'"):
        _ = parl_core.hypergradeint
    assert set(parl_core._HOME_OF) | set(parl_core._MODULES) == set(parl_core.__all__)
