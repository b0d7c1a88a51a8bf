"""Whether the data of a policy problem let finite differences see the implicit term."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import starmap

import torch
from torch import Tensor, nn

from ...trajectories import PreferencePairs, Trajectories
from ..linearize import linearize
from ..losses import UpperLoss


@dataclass
class Sight:
    """Looks for upper data that stay as they are while the policy moves.

    Discrete actions drawn with the same random numbers do: the loss is then piecewise constant in the policy, and its
    differences hold the direct term alone, in perfect agreement with each other.
    """

    loss: UpperLoss
    upper: Trajectories | PreferencePairs
    """At the unperturbed reward."""
    log_probs: list[Tensor]
    """(N,) of their trajectories under the policy that is best there."""
    looks: int = 0
    blind: int = 0

    @classmethod
    def at(cls, policy: nn.Module, loss: UpperLoss, upper: Trajectories | PreferencePairs) -> Sight:
        return cls(loss, upper, _log_probs(policy, loss.trajectories(upper)))

    def look(self, policy: nn.Module, upper: Trajectories | PreferencePairs) -> None:
        """Compare data at a perturbed reward, and the policy that is best there."""
        self.looks += 1
        before, after = self.loss.trajectories(self.upper), self.loss.trajectories(upper)
        if torch.equal(upper.weights, self.upper.weights) and all(starmap(_same, zip(before, after, strict=True))):
            self.blind += _moved(self.log_probs, _log_probs(policy, after), self.upper.weights)

    def remarks(self, lower: Trajectories) -> list[str]:
        """Lines of the header, if there is anything to say."""
        samples = {"lower": lower, "upper": self.upper}
        drawn = [f"{name} ({data.weights.shape[0]})" for name, data in samples.items() if data.is_sample]
        found = []
        if drawn:
            found.append(
                f"SAMPLED DATA, {' and '.join(drawn)}: estimators and differences agree only up to the sampling noise, of "
                "which the accuracy below knows nothing"
            )
        if self.blind:
            found.append(
                f"REFERENCE BLIND TO THE IMPLICIT TERM: at {self.blind} of {self.looks} perturbed rewards the policy had "
                "moved, but data gave the same upper trajectories with the same weights; see PolicyProblem.data for what "
                "can be differentiated"
            )
        return found


def _same(one: Trajectories, other: Trajectories) -> bool:
    names = ("observations", "actions", "offsets")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def _moved(before: list[Tensor], after: list[Tensor], weights: Tensor) -> bool:
    """Whether the probability of any trajectory that counts has changed by more than the rounding of a solve."""
    changes = [(new - old).abs()[weights != 0] for old, new in zip(before, after, strict=True)]
    return any(bool((change > torch.finfo(change.dtype).eps ** 0.5).any()) for change in changes)


def _log_probs(policy: nn.Module, parts: tuple[Trajectories, ...]) -> list[Tensor]:
    return [part.sum_steps(linearize(policy, part).log_prob) for part in parts]
