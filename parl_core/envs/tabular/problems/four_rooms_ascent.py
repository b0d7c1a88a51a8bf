"""Gradient ascent on Four-Rooms in the published protocol, with any of the estimators named here."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ....errors import NonFiniteError, import_extra, unknown_name
from ..mdp import Array, checked
from .four_rooms import BUDGET, GOALS, HORIZON, INITIAL_SCALE, NUM_WEIGHTS, START, TARGET, four_rooms_mdp, state_of

EXACT_ESTIMATORS = (
    "exact",
    "AMD",
    "LogProbHessian",
    "Identity",
    "Unrolled",
    "SoBiRL",
    "NudgedContrast",
    "ValuePenalty",
    "ZeroOrder",
    "DirectOnly",
)
"""From the MDP itself. "exact" is the adjoint's gradient: Fisher, HPGD and BCHG have the same expectation at the follower's
optimum and no form of their own here. AMD makes one warm-started sweep a step; Unrolled goes 50 steps of 1 over the largest
eigenvalue's bound; the contrasts nudge the follower's reward by .1 λ r_U; ZeroOrder takes one direction a step, of radius
.01. The rewards are of the state alone, so SoBiRL's shortcut, whose ∇r drops out, is DirectOnly."""
SAMPLED_ESTIMATORS = (
    "CertaintyEquivalent",
    "HPGD",
    "BCHG",
    "Fisher",
    "SoBiRL",
    "NudgedContrast",
    "ValuePenalty",
    "ZeroOrder",
    "DirectOnly",
)
"""From episodes alone; `sampled` says what the first five are. The contrasts, nudged by λ r_U, and ZeroOrder, of radius .5,
sample two policies with half of the steps each."""
AVERAGED_SHARE = 0.1
"""Of the outer steps, the last: the published value is a mean over 1000 of 10 000."""
_LARGEST_RESIDUAL = 1e-9  # of the follower's optima, a hundred times what Newton's method is asked for


class Ascent(NamedTuple):
    """How an ascent went."""

    value: float
    """The leader's exact objective, mean over both goals and the last AVERAGED_SHARE of the steps."""
    seen: float
    """The same as the estimator itself saw it on the goals that were drawn."""
    weights: Array
    """(105,) at the end."""
    values: Array
    """(k,) the exact objective at k equidistant steps, from the first on."""
    norms: Array
    """(k,) the gradient's norm there, before clipping."""


def initial_weights(seed: int, scale: float = INITIAL_SCALE) -> Array:
    """(105,) normal numbers of standard deviation `scale`."""
    return np.random.default_rng(seed).normal(0.0, scale, NUM_WEIGHTS)


def four_rooms_ascent(
    estimator: str,
    weights: npt.ArrayLike,
    temperatures: npt.ArrayLike,
    cost: float,
    learning_rate: float,
    seed: int,
    *,
    env_steps: int = 0,
    num_points: int = 0,
) -> Ascent:
    """len(temperatures) steps of stochastic gradient ascent: a goal drawn for each, the gradient's norm clipped to 1.

    Args:
        estimator: one of EXACT_ESTIMATORS, or of SAMPLED_ESTIMATORS if env_steps is not 0.
        weights: (105,) to start from; they are not changed.
        temperatures: λ of every step.
        cost: c.
        seed: of goals, episodes and directions.
        env_steps: environment steps of the follower that the estimator gets for an outer step; the follower's policy is its
            exact optimum in any case, as published. 0 for the exact estimators.
        num_points: k of `Ascent.values`.

    Raises:
        MissingExtraError: numba is not installed.
        UnknownNameError, ValueError: an estimator that is none, wrong shapes, too few env_steps, a follower whose optimum
            was not found.
        NonFiniteError: the ascent diverged, or began with numbers that are not finite.
    """
    known = SAMPLED_ESTIMATORS if env_steps else EXACT_ESTIMATORS
    if estimator not in known:
        raise unknown_name("estimator from episodes" if env_steps else "exact estimator", estimator, known)
    temperatures = np.ascontiguousarray(temperatures, dtype=np.float64)
    if temperatures.ndim != 1 or len(temperatures) == 0 or not (temperatures > 0).all():
        raise ValueError(f"temperatures must be (number of steps,) positive numbers, got shape {temperatures.shape}")
    episodes = 3 if estimator == "Fisher" else 1  # it halves them, and centres one half
    if env_steps and env_steps < episodes * HORIZON:
        raise ValueError(
            f"env_steps must be 0 or at least {episodes * HORIZON}, {episodes} of the longest episodes, for {estimator}, "
            f"got {env_steps}"
        )
    import_extra("numba", "numba", needed_for="The ascent on Four-Rooms")
    from ..kernels import four_rooms as kernels
    from ..kernels.iteration import compressed_rows
    from ..kernels.newton import bandwidth

    scenes, band = [], 0
    for goal, cell in enumerate(GOALS):
        mdp = four_rooms_mdp(goal)
        starts, successors, probabilities = compressed_rows(mdp.transitions)
        band = max(band, bandwidth(starts, successors, mdp.num_actions))
        scenes.append(
            kernels.Scene(
                starts,
                successors,
                probabilities,
                discount=mdp.discount,
                first_state=state_of(START),
                goal=state_of(cell),
                target=state_of(TARGET),
                budget=BUDGET,
                cost=float(cost),
                horizon=HORIZON,
            )
        )
    kinds = {
        "exact": kernels.EXACT,
        "AMD": kernels.AMD,
        "LogProbHessian": kernels.LOG_PROB_HESSIAN,
        "Identity": kernels.IDENTITY,
        "Unrolled": kernels.UNROLLED,
        "SoBiRL": kernels.SOBIRL,
        "NudgedContrast": kernels.NUDGED_CONTRAST,
        "ValuePenalty": kernels.VALUE_PENALTY,
        "ZeroOrder": kernels.ZERO_ORDER,
        "DirectOnly": kernels.DIRECT_ONLY,
        "CertaintyEquivalent": kernels.CERTAINTY_EQUIVALENT,
        "HPGD": kernels.HPGD,
        "BCHG": kernels.BC_HG,
        "Fisher": kernels.FISHER,
    }
    weights = checked("weights", weights, (NUM_WEIGHTS,)).copy()
    values, norms = np.zeros((2, num_points))
    value, seen, residual = kernels.ascend(
        kinds[estimator],
        env_steps,
        seed,
        tuple(scenes),
        band,
        weights,
        temperatures,
        float(learning_rate),
        max(1, round(AVERAGED_SHARE * len(temperatures))),
        values,
        norms,
    )
    if not (np.isfinite(value) and np.isfinite(weights).all()):
        raise NonFiniteError(
            f"weights must stay finite, got NaN or infinities with learning_rate {learning_rate} and cost {cost}: check "
            "both, or lower the learning rate"
        )
    if not residual <= _LARGEST_RESIDUAL:
        raise ValueError(
            f"temperatures must let the follower's optimum be found, got a residual of {residual:.1e} with a lowest "
            f"temperature of {temperatures.min():g}: raise it"
        )
    return Ascent(value, seen, weights, values, norms)
