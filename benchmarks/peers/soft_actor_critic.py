"""Soft actor-critic on walker-walk, one update per environment step: our training loop, and those of peers.

Everyone has two hidden layers of one width in actor and critics, batches as large as the layers are wide, float32, targets
that move at every update, and the same wrapped environment.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch

from benchmarks.harness import moved_alike
from parl_core.envs.interface import Environment
from parl_core.envs.registry import make_env
from parl_core.envs.vector import make_environments
from parl_core.ops import backend
from parl_core.rl.sac import SAC, SACConfig
from parl_core.training.presets import preset
from parl_core.training.trainer import TICK, Trainer

ENV = "dm_control/walker-walk"
OBS_DIM, ACT_DIM = 24, 6
Run = Callable[[], Any]
"""Runs a block of environment steps with as many updates. Returns (steps taken, updates done, actor parameters, critic
parameters, 1 if all of them are finite, 1 if every weight and bias of actor, critics and targets has moved)."""
Networks = tuple[list[np.ndarray], ...]
"""Copies of the parameters of actor, critics and target critics."""


def update_flops(width: int) -> float:
    """Of one update, the fewest.

    Forward, the actor goes twice, and each critic three times, its target's included. Backwards, actor and critics once: to
    all weights, and to what every layer but the first is fed. The actor's step goes backwards through the critics too, to
    the actions alone.
    """
    actor = OBS_DIM * width + width * width + 2 * ACT_DIM * width
    critic = (OBS_DIM + ACT_DIM) * width + width * width + width
    actor_inner, critic_inner = actor - OBS_DIM * width, critic - (OBS_DIM + ACT_DIM) * width
    products = 3 * actor + actor_inner + 2 * (4 * critic + 2 * critic_inner + ACT_DIM * width)
    return 2.0 * width * products


def num_parameters(width: int) -> tuple[int, int]:
    """Of the actor, and of both critics together."""

    def count(inputs: int, outputs: int) -> int:
        return (inputs + 1) * width + (width + 1) * width + (width + 1) * outputs

    return count(OBS_DIM, 2 * ACT_DIM), 2 * count(OBS_DIM + ACT_DIM, 1)


def parl_core(width: int, steps: int, backend_name: str | None = None) -> Run:
    """`Trainer` on the true reward."""
    if steps % TICK:
        raise ValueError(f"steps must be a multiple of {TICK}, at which the trainer says where it is, got {steps}")
    config = replace(
        preset(ENV, "oracle", "cpu"),
        random_steps=width,
        steps=10**9,
        eval_interval=10**9,
        sac=SACConfig(hidden=(width, width), batch_size=width, target_update_interval=1),
    )
    trainer = Trainer(config, make_environments(ENV, [0]), make_env(ENV, 1))
    events = trainer.run()

    def advance(until: int) -> None:
        with backend(backend_name) if backend_name else nullcontext():
            while trainer.step < until:
                next(events)

    advance(2 * width + TICK - 2 * width % TICK)

    if backend_name is None:
        check_updates(trainer)
    agent = trainer.agent

    def run() -> Any:
        start, updates, before = trainer.step, agent.num_updates, _agent_networks(agent)
        advance(start + steps)
        return np.array([trainer.step - start, agent.num_updates - updates, *_told(before, _agent_networks(agent))])

    return run


def check_updates(trainer: Trainer) -> None:
    """A few updates, from where training is, are those of the reference.

    Raises:
        WrongAnswer: they are not.
    """
    start, agents = (
        _agent_networks(trainer.agent),
        {None: deepcopy(trainer.agent), "reference": deepcopy(trainer.agent)},
    )
    batches = [trainer.replay.sample(trainer.config.sac.batch_size, torch.Generator().manual_seed(i)) for i in range(5)]
    for name, agent in agents.items():
        for batch in batches:
            agent.update(batch, backend=name)
    check = moved_alike(start, _agent_networks(agents["reference"]), rtol=1e-2)
    check(_agent_networks(agents[None]))


def stable_baselines3(width: int, steps: int) -> Run:
    """In torch."""
    import stable_baselines3 as package

    return _learner(package, width, steps, _torch_networks)


def sbx(width: int, steps: int) -> Run:
    """The same interface on JAX; a whole update is one compiled function."""
    import sbx as package

    return _learner(package, width, steps, _jax_networks)


def _learner(package: Any, width: int, steps: int, networks: Callable[[Any], Networks]) -> Run:
    model = package.SAC(
        "MlpPolicy",
        _gym_env(make_env(ENV, 0)),
        batch_size=width,
        learning_starts=width,
        train_freq=1,
        gradient_steps=1,
        policy_kwargs={"net_arch": [width, width]},
        buffer_size=100_000,
        seed=0,
    )
    model.learn(2 * width)

    def run() -> Any:
        start, updates, before = model.num_timesteps, model._n_updates, networks(model)
        model.learn(steps, reset_num_timesteps=False)
        return np.array([model.num_timesteps - start, model._n_updates - updates, *_told(before, networks(model))])

    return run


def _told(before: Networks, after: Networks) -> list[float]:
    """Sizes of actor and critics, whether they are finite, and whether everything has moved."""
    finite = all(bool(np.isfinite(param).all()) for params in after for param in params)
    pairs = zip(chain(*before), chain(*after), strict=True)
    moved = all(not np.array_equal(old, new) for old, new in pairs)
    actor, critic, _ = after
    return [sum(param.size for param in actor), sum(param.size for param in critic), finite, moved]


def _agent_networks(agent: SAC) -> Networks:
    return _copies(agent.actor, agent.critic, agent.target_critic)


def _torch_networks(model: Any) -> Networks:
    return _copies(model.actor, model.critic, model.critic_target)


def _copies(*modules: Any) -> Networks:
    return tuple([param.detach().numpy().copy() for param in module.parameters()] for module in modules)


def _jax_networks(model: Any) -> Networks:
    import jax

    policy = model.policy
    trees = policy.actor_state.params, policy.qf_state.params, policy.qf_state.target_params
    return tuple([np.array(leaf) for leaf in jax.tree.leaves(tree)] for tree in trees)


def _gym_env(env: Environment) -> Any:
    import gymnasium

    class Wrapped(gymnasium.Env[Any, Any]):
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (env.obs_dim,), np.float32)
        action_space = gymnasium.spaces.Box(-1.0, 1.0, (env.act_dim,), np.float32)

        def reset(
            self, *, seed: int | None = None, options: dict[str, Any] | None = None
        ) -> tuple[Any, dict[str, Any]]:
            return env.reset(), {}

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            step = env.step(action)
            return step.observation, step.reward, step.terminated, step.truncated, {}

    return Wrapped()
