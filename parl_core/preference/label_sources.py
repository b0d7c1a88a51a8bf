"""Who answers queries: the two methods a source of labels has, and the check of what it answers.

A source may be a scripted teacher (`teachers.py`), a person behind a screen, a model, or anything else with these methods.
One that prefers the segment in which the first number of an observation ends higher, and does not judge close calls:

>>> from parl_core.rl.rollout import Segments
>>> class EndsHigher:
...     def label(self, first, second):
...         ends = [segments.observations[:, -1, 0] for segments in (first, second)]
...         labels = (ends[1] > ends[0]).float()
...         labels[(ends[1] - ends[0]).abs() < 0.1] = torch.nan
...         return labels
...
...     def episode_ended(self, true_return, length):
...         pass
>>> def segments(*ends):
...     observations = torch.tensor(ends).reshape(-1, 1, 1)
...     return Segments(observations, torch.zeros(len(ends), 1, 2), torch.zeros(len(ends), 1))
>>> check_labels(EndsHigher().label(segments(0.0, 3.0, 1.0), segments(1.0, 2.0, 1.05)), 3)
tensor([1., 0., nan])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..errors import ParlError

if TYPE_CHECKING:
    from ..rl.rollout import Segments


class LabelError(ParlError, ValueError):
    """What a source of labels returned are not labels of the queries it was asked."""


class LabelSource(Protocol):
    """Answers preference queries.

    A source with state that a resumed run needs also has `state_dict()` and `load_state_dict(state)`, of nested
    dicts and lists of tensors, NumPy arrays, numbers, strings and None; one without them is taken to have none.
    """

    def label(self, first: Segments, second: Segments) -> Tensor:
        """Judge M pairs of segments of L steps.

        Returns:
            (M,) in [0, 1], the probability that the *second* segment is preferred: 1 and 0 are clear answers, 0.5
            says that both are equally good. NaN is no answer: the query is skipped. It counts against the label
            budget and is not learned from.
        """
        ...

    def episode_ended(self, true_return: float, length: int) -> None:
        """Be told of every finished training episode: its undiscounted true return and its steps."""
        ...


def check_labels(labels: object, num: int) -> Tensor:
    """What a source returned for `num` queries as labels (num,) float32 on the CPU, if that is what it is.

    Args:
        labels: a tensor, a NumPy array or a sequence of numbers, each in [0, 1] or NaN.

    Raises:
        LabelError: something else.
    """
    try:
        checked = torch.as_tensor(labels).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise LabelError(f"labels must be {num} numbers, one for each query, got {labels!r}") from error
    if checked.shape != (num,) or checked.is_complex():
        raise LabelError(
            f"labels must have shape ({num},), one real number for each query, "
            f"got shape {tuple(checked.shape)} of {checked.dtype}"
        )
    outside = (checked < 0) | (checked > 1)
    if outside.any():
        index = int(outside.nonzero()[0])
        raise LabelError(
            f"labels must lie in [0, 1] or be NaN for a skipped query, got {checked[index]} for query {index}"
        )
    return checked.to("cpu", torch.float32)
