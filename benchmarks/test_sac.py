"""Soft actor-critic on DM Control walker-walk: blocks of environment steps with an update each, simulator included.

An answer is right if the block was as long as asked for, with an update for each step, and the networks are the same size as
everyone's, finite, and have moved, the targets too. Ours must, before that, make the updates that its reference makes. The
floor is that of the updates' matrix products alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.harness import WrongAnswer, gemm_floor
from benchmarks.peers import soft_actor_critic as peers

SIZES = [(64, 200), (128, 100), (256, 60)]


@pytest.mark.parametrize("width, steps", SIZES, ids=[f"h{width}-B{width}-{steps}steps" for width, steps in SIZES])
def test_training(contest, width, steps):
    expected = [steps, steps, *peers.num_parameters(width), 1, 1]

    def check(answer: Any) -> float:
        if not np.array_equal(answer, expected):
            raise WrongAnswer(f"steps, updates, parameters, finite and moved are {list(answer)}, not {expected}")
        return 0.0

    contest(
        check,
        ours={
            "parl-core": lambda: peers.parl_core(width, steps),
            "parl-core, torch": lambda: peers.parl_core(width, steps, "reference"),
        },
        peers={
            "SBX": lambda: peers.sbx(width, steps),
            "Stable-Baselines3": lambda: peers.stable_baselines3(width, steps),
        },
        floor=gemm_floor(steps * peers.update_flops(width), width, width),
    )
