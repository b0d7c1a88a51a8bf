"""Whether an answer is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Check = Callable[[Any], float]
"""From an answer to its error; raises `WrongAnswer` where that is too large."""


class WrongAnswer(Exception):
    """An answer whose speed is of no interest; the message says what is wrong with it."""


def against(reference: Any, rtol: float) -> Check:
    """The check that compares with `reference`, best computed in float64.

    Args:
        reference: a tensor or an array, or a tuple or list of them.
        rtol: the largest difference that is allowed, relative to the largest entry of the same reference tensor.
    """
    expected = _arrays(reference)

    def error(answer: Any) -> float:
        given = _arrays(answer)
        if [array.shape for array in given] != [array.shape for array in expected]:
            shapes = " and ".join(str([array.shape for array in arrays]) for arrays in (given, expected))
            raise WrongAnswer(f"shapes of answer and reference differ: {shapes}")
        worst = 0.0
        for one, other in zip(given, expected, strict=True):
            scale = float(np.abs(other).max(initial=0.0)) or 1.0
            difference = float(np.abs(one - other).max(initial=0.0)) / scale
            if not difference <= rtol:  # NaN too
                raise WrongAnswer(f"its error is {difference:.1e}, {rtol:.0e} is allowed")
            worst = max(worst, difference)
        return worst

    return error


def _arrays(answer: Any) -> list[np.ndarray]:
    """Flat list of float64 arrays."""
    if isinstance(answer, tuple | list):
        return [array for part in answer for array in _arrays(part)]
    if isinstance(answer, torch.Tensor):
        answer = answer.detach().double().numpy()
    return [np.asarray(answer, dtype=np.float64)]
