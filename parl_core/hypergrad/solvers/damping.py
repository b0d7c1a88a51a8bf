from __future__ import annotations

from dataclasses import dataclass

import torch


class Damped:
    def __init__(self, operator, damping):
        self.operator, self.damping = operator, damping
        self.cost = operator.cost

    def __call__(self, v):
        return self.operator(v) + self.damping * v


def automatic_damping(operator, rhs, *, products=10):
    return 1e-2 * float(rhs.dot(operator(rhs)) / rhs.dot(rhs))


@dataclass
class OuterProducts:
    rows: torch.Tensor
    weights: torch.Tensor
    cost: float
