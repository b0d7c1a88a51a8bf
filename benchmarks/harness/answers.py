"""Whether an answer is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Check = Callable[[Any], float]
"""From an answer to its error; raises `WrongAnswer` where that is too large."""


_MOST_TOLD = 300
"""Characters."""


class WrongAnswer(Exception):
    """An answer whose speed is of no interest; the message says what is wrong with it."""


class Absent(Exception):
    """A contestant that does not exist here, such as an op without this backend; the message says why. It is no failure."""


class Unrecordable(Absent):
    """A contestant that no CUDA graph can hold: no failure of a peer's, but one of a kernel's."""


def first_line(error: Exception) -> str:
    """What it says, short enough for a table: compilers say pages."""
    return (str(error).strip().splitlines() or [""])[0][:_MOST_TOLD]


def against(reference: Any, rtol: float, *, blocks: Sequence[int] | None = None) -> Check:
    """The check that compares with `reference`, best computed in float64.

    Args:
        reference: a tensor or an array, or a tuple or list of them.
        rtol: the largest difference that is allowed, relative to the largest entry of the same block.
        blocks: sizes of the parts of the last dimension that are blocks, such as the layers of a parameter vector; None:
            each tensor is a block.
    """
    # Copies: what is written into the reference's own memory would be right.
    expected = [array.copy() for array in _arrays(reference)]
    parts = _split(expected, blocks)

    def error(answer: Any) -> float:
        given = _split(_same_shapes(answer, expected), blocks)
        pairs = zip(given, parts, strict=True)
        return max(_allowed(_largest(one - other) / (_largest(other) or 1.0), rtol) for one, other in pairs)

    return error


def moved_alike(start: Any, reference: Any, rtol: float) -> Check:
    """The check of parameters after training: they went from `start` to where `reference` is.

    Rounding can turn single steps of Adam around, whose size does not tell that of the gradient; so the difference to the
    reference is measured against the way from start to reference, each in the Euclidean norm of the same tensor.

    Args:
        start, reference: parameters before and after; a tensor or an array, or a tuple or list of them.
        rtol: the largest difference that is allowed, relative to the length of the way; 1 is that of an answer that stays
            where it began.
    """
    before, after = ([array.copy() for array in _arrays(params)] for params in (start, reference))

    def error(answer: Any) -> float:
        ways = zip(_same_shapes(answer, after), after, before, strict=True)
        return max(_allowed(float(np.linalg.norm(a - b) / np.linalg.norm(b - c)), rtol) for a, b, c in ways)

    return error


def _same_shapes(answer: Any, expected: list[np.ndarray]) -> list[np.ndarray]:
    given = _arrays(answer)
    if [array.shape for array in given] != [array.shape for array in expected]:
        shapes = " and ".join(str([array.shape for array in arrays]) for arrays in (given, expected))
        raise WrongAnswer(f"shapes of answer and reference differ: {shapes}")
    return given


def _allowed(error: float, rtol: float) -> float:
    if not error <= rtol:  # NaN too
        raise WrongAnswer(f"its error is {error:.1e}, {rtol:.0e} is allowed")
    return error


def _largest(array: np.ndarray) -> float:
    return float(np.abs(array).max(initial=0.0))


def _split(arrays: list[np.ndarray], blocks: Sequence[int] | None) -> list[np.ndarray]:
    if blocks is None:
        return arrays
    if any(array.shape[-1] != sum(blocks) for array in arrays):
        raise ValueError(f"blocks must add up to the last dimension, got {list(blocks)}")
    return [part for array in arrays for part in np.split(array, np.cumsum(blocks)[:-1], axis=-1)]


def _arrays(answer: Any) -> list[np.ndarray]:
    """Flat list of float64 arrays."""
    if isinstance(answer, tuple | list):
        return [array for part in answer for array in _arrays(part)]
    if isinstance(answer, torch.Tensor):
        answer = answer.detach().double().cpu().numpy()
    return [np.asarray(answer, dtype=np.float64)]


def agrees_with(reference: Any, rtol: float) -> Check:
    """As `against`, computed where the reference is, such as on a GPU; shapes may differ where the entries' order does not.

    Args:
        reference: a tensor, or a tuple or list of them, best in float64.
        rtol: the largest difference that is allowed, relative to the largest entry of the same tensor.
    """
    expected = [part.detach().double().clone().reshape(-1) for part in _tensors(reference)]

    def error(answer: Any) -> float:
        given = [part.detach().reshape(-1) for part in _tensors(answer)]
        if [part.numel() for part in given] != [part.numel() for part in expected]:
            sizes = " and ".join(str([part.numel() for part in parts]) for parts in (given, expected))
            raise WrongAnswer(f"sizes of answer and reference differ: {sizes}")
        return max(_allowed(_distance(one, other), rtol) for one, other in zip(given, expected, strict=True))

    return error


def _distance(answer: Tensor, reference: Tensor) -> float:
    if not reference.numel():
        return 0.0
    return float((answer.to(reference.device).double() - reference).abs().max() / (reference.abs().max() or 1.0))


def _tensors(answer: Any) -> list[Tensor]:
    """Flat list of tensors, also from JAX."""
    if isinstance(answer, tuple | list):
        return [tensor for part in answer for tensor in _tensors(part)]
    return [answer if isinstance(answer, Tensor) else torch.from_dlpack(answer)]
