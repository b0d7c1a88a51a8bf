"""One update of `SAC` as one launch: the kernels of the plain update, recorded as a CUDA graph.

An update is about 160 operations of torch, most of them on 256 rows or fewer: launched one by one, it is the CPU that they
wait for. A graph holds them all, with the addresses of their memory and the numbers that came from Python. So each batch is
copied to one place, and graphs are recorded anew when something that they hold has moved or changed. They work on the
agent's own tensors: graphs and plain updates may take turns, and checkpoints know nothing of it. Under autocast updates are
plain, since a replay would not renew the casts of weights that it keeps; so are those that a caller's own graph records.

There are two graphs, of updates that move the target critics and of those that do not; the host counts. The first update
of either kind runs kernel by kernel, since what torch makes at first use cannot be made while a graph is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..offsets import is_capturing
from ..optim import is_bare_adam
from .native_sac import REPORT, is_unchanged
from .replay import Batch

if TYPE_CHECKING:
    from .sac import SAC


def update(sac: SAC, batch: Batch) -> dict[str, Tensor]:
    """As `SAC.update`."""
    if is_capturing() or torch.is_autocast_enabled("cuda"):
        return sac._reference_update(batch)
    # A hook runs on the host, which a replay does not ask.
    if not (is_unchanged(sac) and is_bare_adam(sac.actor_optimizer) and is_bare_adam(sac.critic_optimizer)):
        return sac._reference_update(batch)
    graphs = sac.native.graphs
    if graphs is None or not graphs.is_current(sac, batch):
        graphs = sac.native.graphs = GraphedSAC(sac, batch)
    return graphs.update(sac, batch)


class Recorder:
    """Records what is launched on a CUDA device, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()

    def run(self, body: Callable[[], None]) -> None:
        """Run `body` on the stream that records, after all that was launched before and before all that follows."""
        with torch.cuda.device(self._stream.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                body()
            torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, body: Callable[[], None], generator: torch.Generator) -> Callable[[], None]:
        """What launches all of `body`, which does not run now; `generator` goes on from replay to replay."""
        with torch.cuda.device(self._stream.device):
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(generator)
            # What other threads do, such as asking CUDA for memory, is no part of it and must not spoil it.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                body()
        return graph.replay


class _Recording(NamedTuple):
    replay: Callable[[], None]
    gradients: list[tuple[Tensor, Tensor | None]]
    """Each parameter and where the replay leaves its gradient."""


class GraphedSAC:
    """The graphs of one agent, for batches of one size."""

    def __init__(self, sac: SAC, batch: Batch) -> None:
        self._batch = Batch(*(torch.empty_like(part, memory_format=torch.contiguous_format) for part in batch))
        self._report = sac.log_temperature.detach().new_empty(len(REPORT))
        self._recorder = Recorder(sac.device)
        self._ran: set[bool] = set()
        self._recordings: dict[bool, _Recording] = {}
        self._held: list[object] = []

    def is_current(self, sac: SAC, batch: Batch) -> bool:
        """Whether all is as it was when the graphs were recorded, and the batch of the same size."""
        return self._held == _held_by_graphs(sac) and all(
            place.shape == part.shape and place.dtype == part.dtype for place, part in self._places(batch)
        )

    def update(self, sac: SAC, batch: Batch) -> dict[str, Tensor]:
        places, parts = zip(*self._places(batch), strict=True)
        with torch.no_grad():
            torch._foreach_copy_(list(places), list(parts))
        moves_targets = sac.moves_targets()
        if moves_targets not in self._ran:
            self._recorder.run(lambda: self._step(sac, moves_targets))
            self._ran.add(moves_targets)
            self._held = _held_by_graphs(sac)  # Adam's state is made by its first step
        else:
            if moves_targets not in self._recordings:
                self._recordings[moves_targets] = self._record(sac, moves_targets)
            replay, gradients = self._recordings[moves_targets]
            replay()
            for param, gradient in gradients:
                param.grad = gradient
        sac.num_updates += 1
        return dict(zip(REPORT, self._report.clone().unbind(), strict=True))

    def _places(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Each part of a batch after the place it is copied to, but for the indices, which no update uses."""
        return list(zip(self._batch, batch, strict=True))[:-1]

    def _record(self, sac: SAC, moves_targets: bool) -> _Recording:
        replay = self._recorder.record(lambda: self._step(sac, moves_targets), sac.generator)
        return _Recording(replay, [(param, param.grad) for param in sac.learned_params()])

    def _step(self, sac: SAC, moves_targets: bool) -> None:
        report = sac.step(self._batch, moves_targets)
        torch.stack([report[name] for name in REPORT], out=self._report)


def _held_by_graphs(sac: SAC) -> list[object]:
    """Addresses and numbers that are fixed in a graph of `sac`."""
    precision = torch.backends.cuda.matmul.fp32_precision
    held: list[object] = [precision, sac.config, sac.target_entropy, sac.generator, sac.log_temperature]
    for module in (sac.actor, sac.critic, sac.target_critic):
        held += module.parameters()
    for optimizer in (sac.actor_optimizer, sac.critic_optimizer):
        for state in optimizer.state.values():
            held += state.values()
        for group in optimizer.param_groups:
            held += [value for name, value in group.items() if name != "params"]
    return [value.data_ptr() if isinstance(value, Tensor) else value for value in held]
