"""PEBBLE on DM Control walker-walk as the preset `cpu` trains it: blocks of the whole loop in the middle of a run.

A block is environment steps with an update each, acting, a query session with its labels, its reward learning and the
relabelling of the replay, and an evaluation. An answer is right if all of that has been done as often as it should, with
networks of the right sizes, which are finite and have moved, and if the replay then holds the latest networks' rewards. Ours
must, before that, make the updates that its reference makes. The floor is that of the matrix products alone, of updates and
reward learning.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.harness import WrongAnswer, gemm_floor
from benchmarks.harness.contest import MAX_ROUNDS
from benchmarks.peers import preference as peers
from benchmarks.peers import reward_ensemble, soft_actor_critic

BLOCKS = MAX_ROUNDS + 2
"""At most: of all rounds, and of the checks before and after."""


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the preset says."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("steps", [400], ids=["cpu-400steps"])
def test_pebble(contest, steps):
    expected = peers.expected(steps, BLOCKS)

    def check(answer: Any) -> float:
        if not np.array_equal(answer, expected):
            told = ", ".join(
                (*peers.COUNTS, "parameters of actor, critics and rewards", "finite", "moved", "relabelled")
            )
            raise WrongAnswer(f"{told} are {list(answer)}, not {expected}")
        return 0.0

    contest(
        check,
        ours={
            "parl-core": lambda: peers.parl_core(steps, BLOCKS),
            "parl-core, torch": lambda: peers.parl_core(steps, BLOCKS, "reference"),
        },
        peers={"eager torch": lambda: peers.eager_loop(steps, BLOCKS)},
        floor=gemm_floor(_flops(steps), 128, 128),
    )


def _flops(steps: int) -> float:
    """Of a block's updates and reward learning, without relabelling and acting."""
    config = peers.configuration(steps, BLOCKS)
    (width,) = set((*config.sac.hidden, *config.reward.hidden, config.sac.batch_size))
    judged = 2 * config.reward.segment_length * config.reward.max_epochs * peers.FIRST_LABELS
    return steps * soft_actor_critic.update_flops(width) + reward_ensemble.flops(width, judged, 2, 3)
