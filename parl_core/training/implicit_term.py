"""What A-PARL adds to PEBBLE's reward update: the hypergradient's implicit term, through the public call alone.

SAC is an entropy-regularised lower level, so its curvature at the optimum is −α F_d with α SAC's own temperature. Three
approximations are made, all of them visible in the configuration:

1. Windows of recent episodes stand for on-policy trajectories from the policy's own state distribution.
2. Pairs of segments of the latest episodes, labelled in the same session, stand for fresh on-policy pairs. They are other
   episodes than the windows, since the factors of the hypergradient must be independent.
3. The lower level is SAC's current policy, not its optimum.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError
from ..hypergrad import CG, Fisher, HypergradientWarning, PreferenceLoss, Solution, hypergradient
from ..models.rewards import RewardEnsemble
from ..trajectories import PreferencePairs, Trajectories
from .config import ImplicitConfig


@dataclass(frozen=True)
class ImplicitReport:
    """How the implicit term came out in one reward update, averaged over its refreshes."""

    implicit_to_direct: float
    """‖implicit‖ / ‖direct‖ of the hypergradient, before `max_ratio` and `share`."""
    solver_iterations: float
    """Conjugate-gradient iterations."""
    solver_residual: float
    """True relative residual at the end of the solve, the worst of the session."""
    unconverged_solves: int
    """Solves that ended above `rtol`."""


class ImplicitTerm:
    """Computes the implicit term for a reward update and remembers the linear solve's solution for the next one."""

    def __init__(self, config: ImplicitConfig, discount: float) -> None:
        self.config, self.discount = config, discount
        self.solver = CG(rtol=config.rtol, max_iterations=config.max_iterations)
        self._warm_start: Tensor | None = None
        self._refreshes: list[tuple[float, Solution]] = []

    def gradient_hook(
        self,
        policy: nn.Module,
        reward: RewardEnsemble,
        lower: Trajectories,
        upper: PreferencePairs,
        temperature: float,
    ) -> Callable[[Tensor], Tensor]:
        """The function that turns each cross-entropy gradient (P,) of one session into the gradient to step with.

        The learner sums the cross-entropy over the members, while the hypergradient sees their mean reward, whose
        derivative is 1/members of each member's: hence the factor that makes the two commensurate.
        """
        self._refreshes = []
        curvature = Fisher(temperature, damping=self.config.damping_ratio * temperature)
        calls, implicit = 0, torch.empty(0)

        def hook(cross_entropy: Tensor) -> Tensor:
            nonlocal calls, implicit
            if calls % self.config.refresh_interval == 0:
                implicit = reward.num_members * self._refresh(policy, reward, lower, upper, curvature)
            calls += 1
            term = self.config.share * implicit
            limit = self.config.max_ratio * cross_entropy.norm()
            return cross_entropy + term * (limit / term.norm().clamp_min(1e-30)).clamp_max(1.0)

        return hook

    def report(self) -> ImplicitReport | None:
        """Of the last session; None if it took no step."""
        if not self._refreshes:
            return None
        ratios, solutions = zip(*self._refreshes, strict=True)
        return ImplicitReport(
            implicit_to_direct=sum(ratios) / len(ratios),
            solver_iterations=sum(solution.iterations for solution in solutions) / len(solutions),
            solver_residual=max(float(solution.residuals[-1]) for solution in solutions),
            unconverged_solves=sum(not solution.status.ok for solution in solutions),
        )

    def state_dict(self) -> dict[str, Any]:
        """The warm start."""
        return {"warm_start": self._warm_start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._warm_start = state["warm_start"]

    def _refresh(
        self,
        policy: nn.Module,
        reward: RewardEnsemble,
        lower: Trajectories,
        upper: PreferencePairs,
        curvature: Fisher,
    ) -> Tensor:
        with warnings.catch_warnings():
            # The run shows and records the residual of every session; a warning each would bury the rest.
            warnings.simplefilter("ignore", HypergradientWarning)
            result = hypergradient(
                policy,
                reward,
                lower,
                upper,
                loss=PreferenceLoss(),
                discount=self.discount,
                curvature=curvature,
                solver=self.solver,
                x0=self._warm_start,
            )
        assert result.solution is not None  # there is one with every curvature
        if not torch.isfinite(result.implicit).all():
            raise NonFiniteError(
                f"the implicit term of the reward update is not finite: {result.solution.status.message}"
            )
        self._warm_start = result.solution.value
        ratio = float(result.implicit.norm() / result.direct.norm().clamp_min(1e-30))
        self._refreshes.append((ratio, result.solution))
        return result.implicit
