"""The data that everyone passes: ragged trajectories, and pairs of them with a preference label.

Ragged data is one flat tensor per quantity plus `offsets`: trajectory i holds steps offsets[i] … offsets[i+1]−1,
as in torch's jagged layout.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from .errors import NonFiniteError
from .offsets import check_offsets, is_capturing, remember_offsets


class Trajectories:
    """N trajectories (or segments of trajectories) of T steps in all.

    They are data: no gradient flows into them, and rollouts collected under `torch.inference_mode` are welcome.

    Args:
        observations: (T, do), floating point, or integers such as token ids.
        actions: (T, da), or (T,) for integer actions.
        offsets: (N+1,) int64, from 0 to T, non-decreasing; empty trajectories are allowed.
        weights: (N,) probabilities (of an enumeration) or importance weights. Left out, the trajectories are taken as
            an independent sample and each weighs 1/N. They take the dtype of the observations; beside integer
            observations given ones keep their own, and the others have torch's default dtype.

    Raises:
        TypeError, ValueError: a tensor of the wrong type, dtype, shape or device; the message names it.
        NonFiniteError: a NaN or an infinity among observations, actions or weights.
    """

    def __init__(
        self, observations: Tensor, actions: Tensor, offsets: Tensor, *, weights: Tensor | None = None
    ) -> None:
        for name, tensor in (("observations", observations), ("actions", actions), ("offsets", offsets)):
            _require_tensor(name, tensor)
        if observations.dim() != 2 or not _is_number(observations):
            raise ValueError(
                f"observations must be a floating-point or integer tensor of shape (T, do), got {_describe(observations)}"
            )
        if actions.dim() not in (1, 2) or actions.shape[0] != observations.shape[0]:
            raise ValueError(
                f"actions must have shape (T, da) or (T,) with T = {observations.shape[0]} as in observations, "
                f"got {_describe(actions)}"
            )
        if actions.is_complex():
            raise ValueError(f"actions must be real numbers, got {_describe(actions)}")
        check_offsets(offsets, observations.shape[0])
        for name, other in (("actions", actions), ("offsets", offsets)):
            if other.device != observations.device:
                raise ValueError(f"{name} is on {other.device}, but observations is on {observations.device}")
        require_finite("observations", observations)
        require_finite("actions", actions)
        self.observations = _as_data(observations)
        self.actions = _as_data(actions)
        self.offsets = _as_data(offsets)
        remember_offsets(self.offsets, observations.shape[0])
        self.is_sample = weights is None
        self.weights = self._sample_weights() if weights is None else self._checked_weights(weights)
        self._trajectory_index: Tensor | None = None
        self._horizon: int | None = None

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
    def horizon(self) -> int:
        """Steps of the longest trajectory; 0 if there are none. Read from the device when first asked for."""
        if self._horizon is None:
            self._horizon = int(self.lengths.max()) if self.num_trajectories else 0
        return self._horizon

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

    def select(self, index: Tensor) -> Trajectories:
        """The trajectories of the numbers `index` (n,) int64, in that order; repeats are allowed.

        A sample stays a sample, in which each now weighs 1/n. Given weights come along unchanged: they are not
        renormalised.

        Raises:
            TypeError, ValueError: an index that is not (n,) int64 on the data's device, or outside 0 … N−1.
        """
        _check_index(index, self.num_trajectories, self.offsets.device)
        lengths = self.lengths[index]
        offsets = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
        moved = torch.repeat_interleave(self.offsets[index] - offsets[:-1], lengths)  # (T',) old minus new step number
        steps = moved + torch.arange(moved.shape[0], device=moved.device)
        remember_offsets(offsets, moved.shape[0])
        chosen = self._share(
            observations=self.observations[steps],
            actions=self.actions[steps],
            offsets=offsets,
            weights=self.weights[index],
            _trajectory_index=None,
            _horizon=None,
        )
        if self.is_sample:
            chosen.weights = _uniform(chosen.weights)
        return chosen

    def with_weights(self, weights: Tensor) -> Trajectories:
        """The same data, not copied and not checked again, under other `weights` (N,), as in the constructor.

        Raises:
            TypeError, ValueError, NonFiniteError: as the constructor does for weights.
        """
        return self._share(weights=self._checked_weights(weights), is_sample=False)

    def to(self, *args: Any, **kwargs: Any) -> Trajectories:
        """Copy to another device or floating-point dtype, as `Tensor.to`; integers stay integers."""
        moved = Trajectories(
            _move(self.observations, *args, **kwargs),
            _move(self.actions, *args, **kwargs),
            _move(self.offsets, *args, **kwargs),
            weights=self.weights.to(*args, **kwargs),
        )
        if self.is_sample:
            moved.weights, moved.is_sample = _uniform(moved.weights), True
        return moved

    def _share(self, **changes: Any) -> Trajectories:
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def _sample_weights(self) -> Tensor:
        dtype = _weight_dtype(self.observations, None)
        return _uniform(torch.empty(self.num_trajectories, dtype=dtype, device=self.observations.device))

    def _checked_weights(self, weights: Tensor) -> Tensor:
        _require_tensor("weights", weights)
        num = self.num_trajectories
        if weights.shape != (num,) or not weights.is_floating_point():
            raise ValueError(
                f"weights must be a floating-point tensor of shape (N,) = ({num},), got {_describe(weights)}"
            )
        if weights.device != self.observations.device:
            raise ValueError(f"weights is on {weights.device}, but observations is on {self.observations.device}")
        require_finite("weights", weights)
        return _as_data(weights).to(_weight_dtype(self.observations, weights))

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

    Labels and weights take the dtype of the observations; beside integer observations they keep their own.
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
        for name, tensor in (("second", second.observations), ("labels", labels)):
            if tensor.device != first.observations.device:
                raise ValueError(f"{name} is on {tensor.device}, but first is on {first.observations.device}")
        for what in ("observations", "actions"):
            one, other = getattr(first, what), getattr(second, what)
            if one.dtype != other.dtype and (one.is_floating_point() or other.is_floating_point()):
                raise ValueError(f"second.{what} must be {one.dtype} as those of first are, got {other.dtype}")
        require_finite("labels", labels)
        if ((labels < 0) | (labels > 1)).any():
            raise ValueError(
                "labels must lie in [0, 1] (probability that the second is preferred), "
                f"got values from {labels.min().item():g} to {labels.max().item():g}"
            )

        self.first = first
        self.second = second
        self.labels = _as_data(labels).to(_weight_dtype(first.observations, labels))
        self.is_sample = weights is None
        self.weights = _uniform(self.labels) if weights is None else self._checked_weights(weights)

    @property
    def num_pairs(self) -> int:
        """M."""
        return self.labels.shape[0]

    def select(self, index: Tensor) -> PreferencePairs:
        """The pairs of the numbers `index` (n,) int64, in that order; repeats are allowed.

        A sample stays a sample, in which each now weighs 1/n. Given weights come along unchanged: they are not
        renormalised.

        Raises:
            TypeError, ValueError: an index that is not (n,) int64 on the data's device, or outside 0 … M−1.
        """
        _check_index(index, self.num_pairs, self.labels.device)
        weights = self.weights[index]
        return self._share(
            first=self.first.select(index),
            second=self.second.select(index),
            labels=self.labels[index],
            weights=_uniform(weights) if self.is_sample else weights,
        )

    def with_weights(self, weights: Tensor) -> PreferencePairs:
        """The same pairs, not copied and not checked again, under other `weights` (M,), as in the constructor.

        Raises:
            TypeError, ValueError, NonFiniteError: as the constructor does for weights.
        """
        return self._share(weights=self._checked_weights(weights), is_sample=False)

    def _share(self, **changes: Any) -> PreferencePairs:
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def _checked_weights(self, weights: Tensor) -> Tensor:
        _require_tensor("weights", weights)
        if weights.shape != self.labels.shape:
            raise ValueError(f"weights must have shape (M,) = ({self.num_pairs},), got {_describe(weights)}")
        if weights.device != self.labels.device:
            raise ValueError(f"weights is on {weights.device}, but first is on {self.labels.device}")
        require_finite("weights", weights)
        return _as_data(weights).to(_weight_dtype(self.first.observations, weights))

    def to(self, *args: Any, **kwargs: Any) -> PreferencePairs:
        """Copy to another device or floating-point dtype, as `Tensor.to`; integers stay integers."""
        return PreferencePairs(
            self.first.to(*args, **kwargs),
            self.second.to(*args, **kwargs),
            self.labels.to(*args, **kwargs),
            weights=None if self.is_sample else self.weights.to(*args, **kwargs),
        )

    def __repr__(self) -> str:
        return f"PreferencePairs(M={self.num_pairs}, first={self.first!r}, second={self.second!r})"


def require_finite(name: str, tensor: Tensor | None) -> None:
    """Refuse a NaN or an infinity in `tensor`, naming the first place.

    Not while a CUDA graph is captured: nothing has been computed then.
    """
    if tensor is None or not tensor.is_floating_point() or is_capturing():
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


def _weight_dtype(observations: Tensor, given: Tensor | None) -> torch.dtype:
    """That of the observations, or beside integer ones the given numbers' own, or else torch's default."""
    for tensor in (observations, given):
        if tensor is not None and tensor.is_floating_point():
            return tensor.dtype
    return torch.get_default_dtype()


def _uniform(like: Tensor) -> Tensor:
    return torch.full_like(like, 1.0 / max(len(like), 1))


def _is_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or not (tensor.is_complex() or tensor.dtype == torch.bool)


def _check_index(index: object, count: int, device: torch.device) -> None:
    if not isinstance(index, Tensor):
        raise TypeError(f"index must be a torch.Tensor, got {type(index).__name__}")
    if index.dim() != 1 or index.dtype != torch.int64 or index.device != device:
        raise ValueError(
            f"index must be an int64 tensor of shape (n,) on {device}, got {_describe(index)} on {index.device}"
        )
    if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < count):
        raise ValueError(f"index must lie in [0, {count}), got values from {int(index.min())} to {int(index.max())}")


def _move(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    target = torch.empty(0, device=tensor.device).to(*args, **kwargs)
    if not target.is_floating_point():
        raise ValueError(f"dtype must be a floating-point type, got {target.dtype}")
    # By way of a floating-point type, large integers would be rounded.
    return tensor.to(*args, **kwargs) if tensor.is_floating_point() else tensor.to(target.device)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
