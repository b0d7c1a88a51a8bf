"""Tax design: a household works, spends and saves; the leader taxes what it spends on two goods.

A small tabular problem in the spirit of Thoma et al. (NeurIPS 2024, sec. 4.2): consumption taxes on a household with assets,
the leader's reward the tax revenue and the household's welfare. Two points are made so that everything stays exact:

- The household decides what to *spend* on each good, tax included. Of an amount e, a tax at rate t of the price leaves goods
  worth (1 − t) e and yields t e. Assets move by earnings and spending alone, so that taxes enter the rewards and leave the
  transitions as they are, with nothing neglected.
- The two goods differ in how fast further amounts lose in utility. Spending on the necessity hardly falls when it is taxed,
  spending on the luxury does: taxing the former more is Ramsey's inverse-elasticity rule (1927). With logarithmic utility a
  tax would change no decision at all.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from ..mdp import Array, TabularMDP, checked
from ..problem import ParametricReward
from ..soft import check_temperature
from .design import DesignProblem

NUM_ASSETS = 10
"""Asset levels 0, 1, …; what is saved beyond the last is lost."""
HOURS = (0, 1, 2)
SPENDING = (0, 1, 2)
"""On each good, in units of assets."""
WAGE = 2.0
"""Assets for an hour, to be spent from the next step on."""
DISUTILITY = 0.3
"""Of h hours: this times h²."""
CURVATURE = np.array([0.7, 0.2])
"""η of the utility c^(1−η)/(1−η) of an amount c of the necessity and of the luxury."""
TASTE = np.array([0.3, 0.6])
"""Weights of the two utilities."""
DISCOUNT = 0.9
MAX_RATE = 0.9


class TaxDesign(DesignProblem):
    """Rates of two consumption taxes, for revenue and for the household's consumption.

    States are asset levels, actions (hours, spending on the necessity, spending on the luxury), 27 of them. Wages are paid
    at the end of a step, so that spending is out of assets; a household that cannot afford its basket buys the same share of
    both goods with what it has. Assets between two levels are rounded at random, right on average. The leader's parameters
    x (2,) stand for rates t = .9 σ(x); her choice is the rates. In every step she gets log(1 + revenue) + welfare · (goods
    consumed, of both). Taxes make money, and so work, worth less: at high rates the household works less and revenue falls.

    Args:
        temperature: τ > 0 of the household's entropy bonus.
        welfare: weight of consumption against the logarithm of the revenue, at least 0.

    Raises:
        ValueError: an argument out of range.
    """

    num_params = 2
    low, high = np.zeros(2), np.full(2, MAX_RATE)

    def __init__(self, temperature: float = 0.2, welfare: float = 0.2) -> None:
        check_temperature(temperature)
        if not 0.0 <= welfare < np.inf:
            raise ValueError(f"welfare must be at least 0 and finite, got {welfare}")
        self.temperature, self.welfare = float(temperature), float(welfare)
        actions = np.array(list(itertools.product(HOURS, SPENDING, SPENDING)), dtype=np.float64)
        hours, baskets = actions[:, 0], actions[:, 1:]
        levels = np.arange(NUM_ASSETS)[:, None]  # (S, 1)
        share = np.minimum(1.0, levels / np.maximum(baskets.sum(axis=1), 1.0))
        self.spending = share[..., None] * baskets
        """(S, A, 2), taxes included."""
        self._untaxed = TASTE * self.spending ** (1.0 - CURVATURE) / (1.0 - CURVATURE)  # (S, A, 2) utilities
        self._effort = DISUTILITY * hours**2  # (A,)
        saved = np.minimum(levels - self.spending.sum(axis=2) + WAGE * hours, NUM_ASSETS - 1.0)
        transitions = np.maximum(0.0, 1.0 - np.abs(saved[..., None] - levels[:, 0]))  # linear between two levels
        self.mdp = TabularMDP(transitions, np.eye(NUM_ASSETS)[0], DISCOUNT)

    def choice(self, params: npt.ArrayLike) -> Array:
        """Rates (2,) at x (2,)."""
        return MAX_RATE / (1.0 + np.exp(-checked("params", params, (2,))))

    def lower(self, params: npt.ArrayLike) -> ParametricReward:
        """Utility of what the household consumes, less the disutility of its work."""
        rates = self.choice(params)
        value, _ = self.rewards(rates[None])
        by_rate = -(1.0 - CURVATURE) * (1.0 - rates) ** -CURVATURE * self._untaxed
        return ParametricReward(value[0], by_rate * _rate_slopes(rates))

    def upper(self, params: npt.ArrayLike) -> ParametricReward:
        """The logarithm of the revenue, and the household's consumption by its weight."""
        rates = self.choice(params)
        _, value = self.rewards(rates[None])
        revenue = self.spending @ rates
        by_rate = (1.0 / (1.0 + revenue) - self.welfare)[..., None] * self.spending
        return ParametricReward(value[0], by_rate * _rate_slopes(rates))

    def rewards(self, choices: Array) -> tuple[Array, Array]:
        """See `DesignProblem`."""
        kept = 1.0 - choices
        utility = np.einsum("ng,sag->nsa", kept ** (1.0 - CURVATURE), self._untaxed)
        consumed = np.einsum("ng,sag->nsa", kept, self.spending)
        revenue = np.einsum("ng,sag->nsa", choices, self.spending)
        return utility - self._effort, np.log1p(revenue) + self.welfare * consumed


def _rate_slopes(rates: Array) -> Array:
    """dt/dx (2,)."""
    return rates * (1.0 - rates / MAX_RATE)
