"""Whether offsets cut steps into trajectories: checked on the host, and on an accelerator once for each tensor.

Reading numbers from an accelerator waits for all the work given to it, and is impossible while a CUDA graph is captured.
So there a tensor that was found right is remembered, until it is changed or gone. Writing past torch's own count of
changes (`.data`, a kernel of one's own) is not noticed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

# Tensors of offsets that were found right: their version, and the number of steps they cut.
_FOUND_RIGHT: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def check_offsets(offsets: Tensor, num_steps: int) -> None:
    """Refuse offsets that do not cut `num_steps` steps into trajectories."""
    if offsets.dim() != 1 or offsets.dtype != torch.int64 or offsets.shape[0] == 0:
        got = f"{str(offsets.dtype).removeprefix('torch.')} of shape {tuple(offsets.shape)}"
        raise ValueError(f"offsets must be an int64 tensor of shape (N+1,), got {got}")
    check_offset_values(offsets, num_steps)


def check_offset_values(offsets: Tensor, num_steps: int) -> None:
    """The part of `check_offsets` that reads the numbers.

    Where a CUDA graph is captured and the tensor is not yet known, the check becomes part of the graph: a device-side
    assertion at every replay. One call before the capture spares that.
    """
    if isinstance(offsets, FakeTensor):  # a shape without numbers
        return
    if reads_are_free(offsets.device):
        _read_offsets(offsets, num_steps)
    elif _FOUND_RIGHT.get(offsets) == _state(offsets, num_steps):
        return
    elif is_capturing():
        _assert_offsets(offsets, num_steps)
    else:
        _read_offsets(offsets, num_steps)
        remember_offsets(offsets, num_steps)


def remember_offsets(offsets: Tensor, num_steps: int) -> None:
    """Offsets made of others that are right, or another tensor of the same numbers, need no check of their own."""
    if not reads_are_free(offsets.device) and not offsets.is_inference():
        _FOUND_RIGHT[offsets] = _state(offsets, num_steps)


def reads_are_free(device: torch.device) -> bool:
    """Whether reading a number on the host waits for nothing."""
    return device.type == "cpu"


def is_capturing() -> bool:
    """Whether what is launched now becomes part of a CUDA graph and does not run."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _state(offsets: Tensor, num_steps: int) -> tuple[int, int]:
    """What must not have changed since the check; a tensor made in inference mode does not count its changes."""
    return (-1, -1) if offsets.is_inference() else (offsets._version, num_steps)


def _read_offsets(offsets: Tensor, num_steps: int) -> None:
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


def _assert_offsets(offsets: Tensor, num_steps: int) -> None:
    right = (offsets[0] == 0) & (offsets[-1] == num_steps) & (offsets[1:] >= offsets[:-1]).all()
    torch._assert_async(right, f"offsets must rise from 0 to the number of steps, {num_steps}, and never fall")
