"""Estimators of a tabular hypergradient from trajectories alone, compiled.

They know the rewards as functions of the leader's parameters, and the discount and temperature; of transitions only what the
episodes show. All but `fisher` learn the policy from the episodes too. What each puts for
f' = E_{d_U}[A_U (∇Q − ∇V)]/τ, the implicit term at a max-entropy optimum:

    hpgd                   A_U, ∇Q and ∇V averaged over visits to (s, a) and s (Thoma et al., NeurIPS 2024)
    bc_hg                  A_U averaged over visits, times the discounted ∇r that follow in the same episode (ICAPS 2026)
    sobirl_shortcut        as bc_hg with the first of these ∇r alone (Yang et al., AISTATS 2025): not f'
    fisher                 the implicit function theorem, −bᵀ H⁻¹ C with H = −τ F_d, as the library's `Fisher` curvature does
                           from trajectories: half the episodes for b, with reward-to-go and a value baseline, half for C
    certainty_equivalent   f' itself in the MDP whose transition and action probabilities are the episodes' frequencies

The last is what batch temporal differences (LSTD) with a table converge to. Averages of what follows a visit carry the noise
of whole episodes; frequencies use every transition out of a state, whatever episode it comes from, so that the noise that is
left is that of the single transitions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import import_extra
from .bilevel import ExactHypergradient
from .mdp import Array, TabularMDP, checked_policy
from .problem import BilevelMDP

IntArray = npt.NDArray[np.int64]


class Episodes(NamedTuple):
    """Trajectories of a tabular MDP from one first state, one after the other."""

    states: IntArray
    """(T,)."""
    actions: IntArray
    """(T,)."""
    last: IntArray
    """(T,): 0 within an episode, 1 at a step with which the MDP ended it, 2 at one after which it was cut."""

    @property
    def number(self) -> int:
        """N."""
        return int(np.count_nonzero(self.last))

    def prefix(self, num_steps: int) -> Episodes:
        """The first steps, the last of which is cut if its episode goes on."""
        episodes = Episodes(*(array[:num_steps].copy() for array in self))
        episodes.last[-1] = episodes.last[-1] or 2
        return episodes

    def returns(self, rewards: Array, discount: float) -> Array:
        """(N,) discounted sums of rewards (S, A)."""
        begins = np.concatenate([[0], np.flatnonzero(self.last)[:-1] + 1])
        time = np.arange(len(self.states)) - np.repeat(begins, np.diff([*begins, len(self.states)]))
        return np.add.reduceat(discount**time * rewards[self.states, self.actions], begins)


def sample_episodes(mdp: TabularMDP, policy: npt.ArrayLike, num_steps: int, horizon: int, seed: int) -> Episodes:
    """`num_steps` steps of `policy` (S, A), in episodes that are cut after `horizon` steps; so is the last, at the end.

    Raises:
        ValueError: more than one first state, numbers below 1.
    """
    policy = checked_policy(policy, mdp)
    first_state = only_first_state(mdp)
    for name, number in (("num_steps", num_steps), ("horizon", horizon)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    import_extra("numba", "numba", needed_for="Sampling episodes")
    from .kernels import sampled as kernels_sampled
    from .kernels.iteration import compressed_rows

    starts, successors, probabilities = compressed_rows(mdp.transitions)
    states, actions, last = np.empty((3, num_steps), np.int64)
    kernels_sampled.seed_numba(seed)
    kernels_sampled.sample_episodes(
        policy, first_state, starts, successors, probabilities, horizon, states, actions, last
    )
    return Episodes(states, actions, last)


def hpgd(problem: BilevelMDP, params: npt.ArrayLike, episodes: Episodes) -> ExactHypergradient:
    """Hyper policy gradient descent; see this module's head."""
    return _by_visits("hpgd_by_reward", problem, params, episodes)


def bc_hg(problem: BilevelMDP, params: npt.ArrayLike, episodes: Episodes) -> ExactHypergradient:
    """BC-HG; see this module's head."""
    return _by_visits("bc_hg_by_reward", problem, params, episodes)


def sobirl_shortcut(problem: BilevelMDP, params: npt.ArrayLike, episodes: Episodes) -> ExactHypergradient:
    """SoBiRL's shortcut, a baseline; see this module's head."""
    return _by_visits("sobirl_by_reward", problem, params, episodes)


def fisher(problem: BilevelMDP, params: npt.ArrayLike, episodes: Episodes) -> ExactHypergradient:
    """The implicit function theorem with Fisher curvature; see this module's head.

    Raises:
        ValueError: fewer than three episodes.
    """
    if episodes.number < 3:
        raise ValueError(f"episodes must be at least 3 to be halved and centred, got {episodes.number}")
    from .kernels import sampled as kernels_sampled

    upper, by_reward = problem.upper(params).value, np.empty(problem.lower(params).value.shape)
    kernels_sampled.fisher_by_reward(
        *episodes,
        problem.response(params),
        upper,
        problem.mdp.discount,
        problem.temperature,
        kernels_sampled.halfway(episodes.last),
        by_reward,
    )
    return _hypergradient(problem, params, episodes, by_reward)


def certainty_equivalent(problem: BilevelMDP, params: npt.ArrayLike, episodes: Episodes) -> ExactHypergradient:
    """The exact hypergradient of the MDP that the episodes look like; see this module's head.

    Consistent; biased by O(1/N), as f' is not linear in the probabilities.
    """
    from .kernels import sampled as kernels_sampled
    from .kernels.iteration import compressed_rows
    from .kernels.newton import bandwidth

    mdp, upper = problem.mdp, problem.upper(params)
    starts, successors, _ = compressed_rows(mdp.transitions)
    band = bandwidth(starts, successors, mdp.num_actions)
    by_reward, visits = np.empty((2, *upper.value.shape))
    factors = np.empty((mdp.num_states, 2 * band + 1))
    kernels_sampled.certainty_equivalent_by_reward(
        *episodes,
        only_first_state(mdp),
        upper.value,
        mdp.discount,
        problem.temperature,
        factors,
        by_reward,
        visits,
    )
    return ExactHypergradient(
        objective=float(np.sum(visits * upper.value)),
        direct=np.einsum("sa,sap->p", visits, upper.jacobian),
        implicit=np.einsum("sa,sap->p", by_reward, problem.lower(params).jacobian),
    )


def mean_visits(mdp: TabularMDP, episodes: Episodes) -> Array:
    """(S, A), the mean over episodes of Σ_t γ^t 1{s_t = s, a_t = a}: an estimate of the discounted occupancy."""
    from .kernels import sampled as kernels_sampled

    visits = np.empty((mdp.num_states, mdp.num_actions))
    kernels_sampled.discounted_visits(*episodes, mdp.discount, visits)
    return visits


def only_first_state(mdp: TabularMDP) -> int:
    """The state in which all episodes begin."""
    if np.count_nonzero(mdp.initial) != 1:
        raise ValueError(f"mdp must begin all episodes in one state, got {np.count_nonzero(mdp.initial)}")
    return int(np.argmax(mdp.initial))


def _by_visits(kernel: str, problem: BilevelMDP, params: npt.ArrayLike, episodes: Episodes) -> ExactHypergradient:
    from .kernels import sampled as kernels_sampled

    compute: Callable[..., None] = getattr(kernels_sampled, kernel)
    upper = problem.upper(params).value
    by_reward = np.empty(upper.shape)
    compute(*episodes, upper, problem.mdp.discount, problem.temperature, by_reward)
    return _hypergradient(problem, params, episodes, by_reward)


def _hypergradient(
    problem: BilevelMDP, params: npt.ArrayLike, episodes: Episodes, by_reward: Array
) -> ExactHypergradient:
    """With the direct term, and the objective, by the episodes' mean discounted visits."""
    upper, visits = problem.upper(params), mean_visits(problem.mdp, episodes)
    return ExactHypergradient(
        objective=float(np.sum(visits * upper.value)),
        direct=np.einsum("sa,sap->p", visits, upper.jacobian),
        implicit=np.einsum("sa,sap->p", by_reward, problem.lower(params).jacobian),
    )
