"""Updates of soft actor-critic, walker-walk's sizes (24 observations, 6 actions), on a batch that lies on the device.

An update is critics, actor, temperature and, every other time, targets. That it is the right one, the tests say; here
everything must be finite and have moved.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.case import Bar, Case, Lab, Run, Setup, by_backend
from benchmarks.harness import WrongAnswer
from parl_core.rl.replay import Batch
from parl_core.rl.sac import SAC, SACConfig

OBS_DIM, ACT_DIM = 24, 6
SIZES, TINY = ((256, 256), (1024, 256)), ((8, 16),)
"""Hidden width, batch."""
_FEW = 4
"""Updates after which everything must have moved."""


def cases(tiny: bool) -> list[Case]:
    """The published size has the bar."""
    return [
        Case(
            topic="sac",
            name=f"update h{width}-B{batch}",
            setup=partial(_setup, width, batch),
            tests=("sac",),
            bars=(Bar(1500.0, work=1.0),) if (width, batch) == SIZES[0] else (),
            op="SAC.update",
            first=(width, batch) == SIZES[0],
        )
        for width, batch in (TINY if tiny else SIZES)
    ]


def _setup(width: int, batch_size: int, lab: Lab) -> Setup:
    generator = torch.Generator(lab.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=lab.device)

    batch = Batch(
        observations=normal(batch_size, OBS_DIM),
        actions=normal(batch_size, ACT_DIM).tanh(),
        rewards=normal(batch_size),
        next_observations=normal(batch_size, OBS_DIM),
        terminated=torch.zeros(batch_size, device=lab.device),
        indices=torch.zeros(batch_size, dtype=torch.int64, device=lab.device),
    )

    def check(answer: Any) -> float:
        if not bool(torch.as_tensor(answer).isfinite().all()):
            raise WrongAnswer("the critics' loss is not finite")
        return 0.0

    return Setup(
        check=check,
        ours=by_backend(
            lambda backend: _updates(_agent(width, batch_size, lab), batch, backend), ("graph", "reference")
        ),
        peers={"torch.compile of the plain update": lambda: _compiled(_agent(width, batch_size, lab), batch)},
        alone=False,
    )


def _agent(width: int, batch_size: int, lab: Lab) -> SAC:
    config = SACConfig(hidden=(width, width), batch_size=batch_size)
    return SAC(OBS_DIM, ACT_DIM, config, torch.Generator(lab.device).manual_seed(0))


def _updates(agent: SAC, batch: Batch, backend: str) -> Run:
    before = [param.detach().clone() for param in _networks(agent)]
    for _ in range(_FEW):
        agent.update(batch, backend=backend)
    moved = all(not torch.equal(old, new) for old, new in zip(before, _networks(agent), strict=True))
    if not moved or not all(bool(param.isfinite().all()) for param in _networks(agent)):
        raise WrongAnswer(f"after {_FEW} updates not every weight and bias has moved, or one is not finite")
    return lambda: agent.update(batch, backend=backend)["critic_loss"]


def _networks(agent: SAC) -> list[Tensor]:
    modules = (agent.actor, agent.critic, agent.target_critic)
    return [param.detach() for module in modules for param in module.parameters()]


def _compiled(agent: SAC, batch: Batch) -> Run:
    update = torch.compile(agent._reference_update)
    return lambda: update(batch)["critic_loss"]
