"""The data that everyone passes: ragged trajectories, and pairs of them with a preference label.

Ragged data is one flat tensor per quantity plus `offsets`: trajectory i holds steps offsets[i] … offsets[i+1]−1,
as in torch's jagged layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import NonFiniteError


class Trajectories:
    """N trajectories (or segments of trajectories) of T steps in all.

    They are data: no gradient flows into them, and rollouts collected under `torch.inference_mode` are welcome.

    Args:
        observations: (T, do), floating point.
        actions: (T, da), or (T,) for integer actions.
        offsets: (N+1,) int64, from 0 to T, non-decreasing; empty trajectories are allowed.
        weights: (N,) probabilities (of an enumeration) or importance weights. Left out, the trajectories are taken as
            an independent sample and each weighs 1/N.

    Raises:
        TypeError, ValueError: a tensor of the wrong type, dtype, shape or device; the message names it.
        NonFiniteError: a NaN or an infinity among observations, actions or weights.
    """

    def __init__(
        self, observations: Tensor, actions: Tensor, offsets: Tensor, *, weights: Tensor | None = None
    ) -> None:
        for name, tensor in (("observations", observations), ("actions", actions), ("offsets", offsets)):
            _require_tensor(name, tensor)
        if observations.dim() != 2 or not observations.is_floating_point():
            raise ValueError(
                f"observations must be a floating-point tensor of shape (T, do), got {_describe(observations)}"
            )
        if actions.dim() not in (1, 2) or actions.shape[0] != observations.shape[0]:
            raise ValueError(
                f"actions must have shape (T, da) or (T,) with T = {observations.shape[0]} as in observations, "
                f"got {_describe(actions)}"
            )
        check_offsets(offsets, observations.shape[0])
        num = offsets.shape[0] - 1
        if weights is not None:
            _require_tensor("weights", weights)
            if weights.shape != (num,) or not weights.is_floating_point():
                raise ValueError(
                    f"weights must be a floating-point tensor of shape (N,) = ({num},), got {_describe(weights)}"
                )
        for name, other in (("actions", actions), ("offsets", offsets), ("weights", weights)):
            if other is not None and other.device != observations.device:
                raise ValueError(f"{name} is on {other.device}, but observations is on {observations.device}")
        for name, other in (("observations", observations), ("actions", actions), ("weights", weights)):
            require_finite(name, other)

        self.observations = _as_data(observations)
        self.actions = _as_data(actions)
        self.offsets = _as_data(offsets)
        self.is_sample = weights is None
        self.weights = (
            torch.full((num,), 1.0 / max(num, 1), dtype=observations.dtype, device=observations.device)
            if weights is None
            else _as_data(weights).to(observations.dtype)
        )
        self._trajectory_index: Tensor | None = None

    @property
    def num_steps(self) -> int:
        """T, the steps of all trajectories together."""
        return self.observations.shape[0]

    @property
    def num_trajectories(self) -> int:
        """N."""
        return self.offsets.shape[0] - 1

    @property
    def lengths(self) -> Tensor:
        """(N,) int64, steps of each trajectory."""
        return self.offsets.diff()

    @property
    def trajectory_index(self) -> Tensor:
        """(T,) int64, the trajectory that each step belongs to."""
        if self._trajectory_index is None:
            self._trajectory_index = torch.repeat_interleave(
                torch.arange(self.num_trajectories, device=self.offsets.device),
                self.lengths,
                output_size=self.num_steps,
            )
        return self._trajectory_index

    @property
    def time(self) -> Tensor:
        """(T,) int64, the step's number within its trajectory, from 0."""
        return torch.arange(self.num_steps, device=self.offsets.device) - self.offsets[:-1][self.trajectory_index]

    @property
    def step_weights(self) -> Tensor:
        """(T,) the weight of each step's trajectory."""
        return self.weights[self.trajectory_index]

    def sum_steps(self, values: Tensor) -> Tensor:
        """Sum `values` (T,) over the steps of each trajectory: (N,). Differentiable."""
        if values.shape != (self.num_steps,):
            raise ValueError(f"values must have shape (T,) = ({self.num_steps},), got {tuple(values.shape)}")
        zeros = values.new_zeros(self.num_trajectories)
        return zeros.index_add(0, self.trajectory_index, values)

    def to(self, *args: Any, **kwargs: Any) -> Trajectories:
        """Copy to another device or floating-point dtype, as `Tensor.to`; integers stay integers."""
        return Trajectories(
            self.observations.to(*args, **kwargs),
            _move(self.actions, *args, **kwargs),
            _move(self.offsets, *args, **kwargs),
            weights=None if self.is_sample else self.weights.to(*args, **kwargs),
        )

    def __repr__(self) -> str:
        return (
            f"Trajectories(N={self.num_trajectories}, T={self.num_steps}, do={self.observations.shape[1]}, "
            f"actions={_describe(self.actions)}, device={self.observations.device})"
        )


class PreferencePairs:
    """M pairs of trajectories with the probability that the *second* of each is preferred.

    Args:
        first, second: `Trajectories` with M segments each; their own weights are not used.
        labels: (M,) in [0, 1]; 1 = the second is preferred, 0.5 = no preference.
        weights: (M,) probabilities or importance weights of the pairs; left out, a sample in which each weighs 1/M.
    """

    def __init__(
        self, first: Trajectories, second: Trajectories, labels: Tensor, *, weights: Tensor | None = None
    ) -> None:
        for name, value in (("first", first), ("second", second)):
            if not isinstance(value, Trajectories):
                raise TypeError(f"{name} must be Trajectories, got {type(value).__name__}")
        _require_tensor("labels", labels)
        num = first.num_trajectories
        if second.num_trajectories != num:
            raise ValueError(f"second must hold {num} segments as first does, got {second.num_trajectories}")
        if labels.shape != (num,):
            raise ValueError(f"labels must have shape (M,) = ({num},), got {_describe(labels)}")
        if weights is not None:
            _require_tensor("weights", weights)
            if weights.shape != (num,):
                raise ValueError(f"weights must have shape (M,) = ({num},), got {_describe(weights)}")
        dtype, device = first.observations.dtype, first.observations.device
        for name, tensor in (("second", second.observations), ("labels", labels), ("weights", weights)):
            if tensor is not None and tensor.device != device:
                raise ValueError(f"{name} is on {tensor.device}, but first is on {device}")
            require_finite(name, tensor)
        if ((labels < 0) | (labels > 1)).any():
            raise ValueError(
                "labels must lie in [0, 1] (probability that the second is preferred), "
                f"got values from {labels.min().item():g} to {labels.max().item():g}"
            )

        self.first = first
        self.second = second
        self.labels = _as_data(labels).to(dtype)
        self.is_sample = weights is None
        self.weights = (
            torch.full((num,), 1.0 / max(num, 1), dtype=dtype, device=device)
            if weights is None
            else _as_data(weights).to(dtype)
        )

    @property
    def num_pairs(self) -> int:
        """M."""
        return self.labels.shape[0]

    def to(self, *args: Any, **kwargs: Any) -> PreferencePairs:
        """Copy to another device or floating-point dtype, as `Tensor.to`."""
        return PreferencePairs(
            self.first.to(*args, **kwargs),
            self.second.to(*args, **kwargs),
            self.labels.to(*args, **kwargs),
            weights=None if self.is_sample else self.weights.to(*args, **kwargs),
        )

    def __repr__(self) -> str:
        return f"PreferencePairs(M={self.num_pairs}, first={self.first!r}, second={self.second!r})"


def check_offsets(offsets: Tensor, num_steps: int) -> None:
    """Refuse offsets that do not cut `num_steps` steps into trajectories."""
    if offsets.dim() != 1 or offsets.dtype != torch.int64 or offsets.shape[0] == 0:
        raise ValueError(f"offsets must be an int64 tensor of shape (N+1,), got {_describe(offsets)}")
    check_offset_values(offsets, num_steps)


def check_offset_values(offsets: Tensor, num_steps: int) -> None:
    """The part of `check_offsets` that reads the numbers."""
    first, last = offsets[0].item(), offsets[-1].item()
    if first != 0:
        raise ValueError(f"offsets must start at 0, got {first}")
    if last != num_steps:
        raise ValueError(f"offsets must end at the number of steps, {num_steps}, got {last}")
    drops = offsets[1:] < offsets[:-1]
    if drops.any():
        at = int(drops.nonzero()[0])
        raise ValueError(
            f"offsets must not decrease, got offsets[{at + 1}] = {offsets[at + 1].item()} after "
            f"offsets[{at}] = {offsets[at].item()}"
        )


def require_finite(name: str, tensor: Tensor | None) -> None:
    """Refuse a NaN or an infinity in `tensor`, naming the first place."""
    if tensor is None or not tensor.is_floating_point():
        return
    finite = torch.isfinite(tensor)
    if not finite.all():
        place = tuple((~finite).nonzero()[0].tolist())
        raise NonFiniteError(f"{name} must be finite, got {tensor[place].item()} at index {place}")


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def _as_data(tensor: Tensor) -> Tensor:
    """Without its graph; a tensor made in inference mode, which autograd would refuse to save, becomes a plain copy."""
    if not tensor.is_inference():
        return tensor.detach()
    with torch.inference_mode(False):
        return tensor.clone()


def _move(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    moved = tensor.to(*args, **kwargs)
    return moved if tensor.is_floating_point() else moved.to(tensor.dtype)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
