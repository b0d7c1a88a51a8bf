"""What A-PARL adds to PEBBLE's reward update: the hypergradient's implicit term, through the public call alone.

SAC is an entropy-regularised lower level, so its curvature at the optimum is −α F_d with α SAC's own temperature. Three
approximations are made, all of them visible in the configuration:

1. Windows of recent episodes stand for on-policy trajectories from the policy's own state distribution.
2. Pairs of segments of the latest episodes, labelled in the same session, stand for fresh on-policy pairs. They are other
   episodes than the windows, since the factors of the hypergradient must be independent.
3. The lower level is SAC's current policy, not its optimum.

The estimate ĝ is a product of averages over few steps, and mostly noise. What is known of it is measured at each refresh:
the data are cut into two halves that share no step, with estimates g₁ and g₂ of their own. Were these independent and as
large as ĝ in the mean, E[g₁·g₂] would be |E g|². Of all multiples of ĝ, the one by |E g|² / E|ĝ|² has the least expected
squared error (Wiener's factor; 1 − stderr²/|ĝ|² is the same in other words). Single values of g₁·g₂ / |ĝ|² scatter by
several tenths, so that the term is weighed by their running mean over refreshes and sessions, and left out where that is
negative. The weight is an approximation itself:

- Two halves of one episode are not quite independent, which makes it too large; with `on_policy_share` 0 the pairs may
  even share steps.
- ĝ contains what the halves have in common, so that the mean of the ratios is below the ratio of the means: by nearly
  .1 where single ones scatter by .4, in products of a Gaussian matrix and vector. It errs on the side of no implicit term.
- Refreshes of one session see the same data: only those of other sessions are new evidence.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError
from ..hypergrad import (
    CG,
    MINRES,
    Fisher,
    HypergradientWarning,
    Identity,
    PreferenceLoss,
    ScoreHessian,
    Solution,
    TrajectoryLoss,
    hypergradient,
)
from ..hypergrad.curvature import Curvature
from ..hypergrad.result import Hypergradient
from ..hypergrad.solvers import Solver
from ..models.rewards import RewardEnsemble
from ..preference.samplers import Queries
from ..rl.rollout import EpisodeStore, Segments
from ..trajectories import PreferencePairs, Trajectories
from .config import ImplicitConfig

MEMORY = 0.8
"""Of the running mean of the halves' agreement: about the last nine refreshes count."""


@dataclass(frozen=True)
class ImplicitReport:
    """How the implicit term came out in one reward update, averaged over its refreshes."""

    implicit_to_direct: float
    """‖implicit‖ / ‖cross-entropy gradient of the step‖, before `max_ratio`, `share` and the weight of what is known."""
    signal: float
    """What the term was weighed by: the estimated share of its squared length that is no noise, in [0, 1]."""
    solver_iterations: float
    """Iterations of the linear solve."""
    solver_residual: float
    """True relative residual at the end of the solve, the worst of the session."""
    unconverged_solves: int
    """Solves that ended above `rtol`."""


@dataclass(frozen=True)
class _Refresh:
    to_direct: float
    signal: float
    solution: Solution


class ImplicitTerm:
    """Computes the implicit term for a reward update; remembers the solve's solution and what was known for the next one."""

    def __init__(self, config: ImplicitConfig, discount: float) -> None:
        self.config, self.discount = config, discount
        self._warm_start: Tensor | None = None
        self._mean_agreement: float | None = None
        self._refreshes: list[_Refresh] = []

    def gradient_hook(
        self,
        policy: nn.Module,
        reward: RewardEnsemble,
        lower: Trajectories,
        upper: PreferencePairs,
        temperature: float,
    ) -> Callable[[Tensor], Tensor] | None:
        """The function that turns each cross-entropy gradient (P,) of one session into the gradient to step with.

        None with the curvature "none": the gradient stays as it is. For the win rate, the second segment of each pair is
        the fresh one.

        The learner sums the cross-entropy over the members, while the hypergradient sees their mean reward, whose
        derivative is 1/members of each member's: hence the factor that makes the two commensurate.
        """
        self._refreshes = []
        if self.config.curvature == "none":
            return None
        calls, implicit = 0, torch.empty(0)

        def hook(cross_entropy: Tensor) -> Tensor:
            nonlocal calls, implicit
            if calls % self.config.refresh_interval == 0:
                result, signal = self.refresh(policy, reward, lower, upper, temperature)
                implicit = reward.num_members * result.implicit
                ratio = float(implicit.norm() / cross_entropy.norm().clamp_min(1e-30))
                assert result.solution is not None  # there is one with every curvature
                self._refreshes.append(_Refresh(ratio, signal, result.solution))
            calls += 1
            term = self.config.share * implicit
            limit = self.config.max_ratio * cross_entropy.norm()
            shortened = term * (limit / term.norm().clamp_min(1e-30)).clamp_max(1.0)
            return cross_entropy + self._refreshes[-1].signal * shortened

        return hook

    def report(self) -> ImplicitReport | None:
        """Of the last session; None if it took no step."""
        found, number = self._refreshes, len(self._refreshes)
        if not found:
            return None
        return ImplicitReport(
            implicit_to_direct=sum(refresh.to_direct for refresh in found) / number,
            signal=sum(refresh.signal for refresh in found) / number,
            solver_iterations=sum(refresh.solution.iterations for refresh in found) / number,
            solver_residual=max(float(refresh.solution.residuals[-1]) for refresh in found),
            unconverged_solves=sum(not refresh.solution.status.ok for refresh in found),
        )

    def state_dict(self) -> dict[str, Any]:
        """The warm start, and how well halves of the data have agreed."""
        return {"warm_start": self._warm_start, "mean_agreement": self._mean_agreement}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._warm_start, self._mean_agreement = state["warm_start"], state["mean_agreement"]

    def refresh(
        self,
        policy: nn.Module,
        reward: RewardEnsemble,
        lower: Trajectories,
        upper: PreferencePairs,
        temperature: float,
    ) -> tuple[Hypergradient, float]:
        """The estimate from all data, its solve begun at the last one's solution; and the weight in [0, 1] it deserves."""
        result = implicit_hypergradient(
            self.config, policy, reward, lower, upper, temperature, self.discount, self._warm_start
        )
        assert result.solution is not None
        if not torch.isfinite(result.implicit).all():
            raise NonFiniteError(
                f"the implicit term of the reward update is not finite: {result.solution.status.message}"
            )
        self._warm_start = result.solution.value
        found = self._agreement(result.implicit, policy, reward, lower, upper, temperature)
        before = found if self._mean_agreement is None else self._mean_agreement
        self._mean_agreement = MEMORY * before + (1 - MEMORY) * found
        return result, max(0.0, self._mean_agreement)

    def _agreement(
        self,
        estimate: Tensor,
        policy: nn.Module,
        reward: RewardEnsemble,
        lower: Trajectories,
        upper: PreferencePairs,
        temperature: float,
    ) -> float:
        """Of two halves of the data with each other; 0 where there are too few to make two halves of."""
        if min(upper.num_pairs, lower.num_trajectories) < 2:
            return 0.0
        first, second = (
            implicit_hypergradient(
                self.config,
                policy,
                reward,
                lower.select(windows),
                upper.select(pairs),
                temperature,
                self.discount,
            ).implicit
            for windows, pairs in zip(_halves(lower.num_trajectories), _halves(upper.num_pairs), strict=True)
        )
        return agreement(estimate, first, second)


def on_policy_queries(
    store: EpisodeStore, num: int, length: int, latest: int, generator: torch.Generator, *, win_rate: bool
) -> Queries:
    """`num` pairs of segments of `length` steps of the `latest` episodes, whose two halves share no step.

    For the win rate only the second segment of each pair is one of these, and the first is of an older episode. Segments
    serve as evenly as their number allows.
    """
    segments = store.latest_segments(store.count_episodes(length), length)
    fresh = len(store.latest_segments(latest, length).true_rewards)
    older = len(segments.true_rewards) - fresh
    order = older + torch.randperm(fresh, generator=generator)
    firsts, seconds = [], []
    for half, part in zip(_halves(num), order.tensor_split(2), strict=True):
        part = part if len(part) else order
        if win_rate:
            firsts.append(torch.randint(older, (len(half),), generator=generator))
            seconds.append(_evenly(part, len(half), generator))
        else:
            both = _evenly(part, 2 * len(half), generator)
            firsts.append(both[::2])
            seconds.append(both[1::2])
    return Queries(take_segments(segments, torch.cat(firsts)), take_segments(segments, torch.cat(seconds)))


def implicit_hypergradient(
    config: ImplicitConfig,
    policy: nn.Module,
    reward: nn.Module,
    lower: Trajectories,
    upper: PreferencePairs,
    temperature: float,
    discount: float,
    x0: Tensor | None = None,
) -> Hypergradient:
    """The public `hypergradient` with the configured curvature and utility, at SAC's temperature.

    The win rate of the pairs' second segments is minus the mean label. It depends on the reward through the policy alone,
    which took the second segments; the first are older and count as given.
    """
    curvature, solver = _curvature_and_solver(config, temperature)
    labels = upper.labels
    win_rate = config.utility == "win-rate"
    with warnings.catch_warnings():
        # The run shows and records the residual of every session; a warning each would bury the rest.
        warnings.simplefilter("ignore", HypergradientWarning)
        return hypergradient(
            policy,
            reward,
            lower,
            upper.second if win_rate else upper,
            loss=TrajectoryLoss(lambda _reward, _fresh: -labels) if win_rate else PreferenceLoss(),
            discount=discount,
            curvature=curvature,
            solver=solver,
            x0=x0,
        )


def agreement(estimate: Tensor, first: Tensor, second: Tensor) -> float:
    """g₁·g₂ / |ĝ|² in [−1, 1], for the estimate ĝ (P,) of all data and those of two independent halves.

    E[g₁·g₂] is the squared length of what all three estimate, and |ĝ|² contains the noise on top of it.
    """
    common = torch.dot(first.double(), second.double())
    return float((common / estimate.double().square().sum().clamp_min(1e-300)).clamp(-1.0, 1.0))


def take_segments(segments: Segments, indices: Tensor) -> Segments:
    """The segments of the numbers `indices` (k,)."""
    return Segments(*(tensor[indices] for tensor in segments))


def _halves(number: int) -> tuple[Tensor, ...]:
    """The numbers 0 … number − 1 in two runs."""
    return torch.arange(number).tensor_split(2)


def _evenly(items: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """`number` of the items (n,), each as often as any other but for one, in random order."""
    rounds = max(1, -(-number // len(items)))
    return torch.cat([items[torch.randperm(len(items), generator=generator)] for _ in range(rounds)])[:number]


def _curvature_and_solver(config: ImplicitConfig, temperature: float) -> tuple[Curvature, Solver]:
    damping = config.damping_ratio * temperature
    limits: dict[str, Any] = {"rtol": config.rtol, "max_iterations": config.max_iterations}
    if config.curvature == "identity":
        return Identity(), CG(**limits)
    if config.curvature == "score":  # away from the optimum it is indefinite
        return ScoreHessian("mean", temperature, damping), MINRES(**limits)
    return Fisher(temperature, damping), CG(**limits)
