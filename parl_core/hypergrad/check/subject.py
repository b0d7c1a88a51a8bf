"""What a problem becomes before it is checked: a re-solved upper loss, and the gradients to hold against its differences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..result import Hypergradient
from ..solvers import CG, MINRES, Dense, Neumann, NystromPCG, Solver

Options = Mapping[str, Any]
Compute = Callable[[], Hypergradient | Tensor]
_DENSE_LIMIT = 1000


class Candidate(NamedTuple):
    """One row of the table before it is computed."""

    name: str
    compute: Compute | None
    """None: it does not apply, for the reason that `note` gives."""
    note: str = ""


@dataclass
class Subject:
    """A problem made ready, at the optimum of its lower level."""

    title: str
    """What it is and how large."""
    start: Tensor
    """(R,) the upper parameters."""
    loss_at: Callable[[Tensor], float]
    """(R,) -> the upper loss with the lower level solved again there."""
    candidates: list[Candidate]
    remarks: Callable[[], list[str]]
    """Lines of the header on what the reference is worth, such as how well the lower level was solved; asked once it and the
    rows are computed."""
    blind: Callable[[], bool] = lambda: False
    """Whether differences of `loss_at` turned out not to see the implicit term."""


def tolerance(dtype: torch.dtype) -> float:
    """A relative residual that leaves the solve no part in the error seen: 1e-10, or what `dtype` allows."""
    return max(1e-10, 100 * torch.finfo(dtype).eps)


def with_every_solver(
    gradient: Callable[..., Compute], dtype: torch.dtype, size: int, *, curvature: str = ""
) -> list[Candidate]:
    """A row for each solver of a (size,) system, CG first; `gradient(solver=…)` makes what it computes."""
    rtol = tolerance(dtype)
    solvers: dict[str, Solver] = {
        "CG": CG(rtol, max_iterations=1000),
        "MINRES": MINRES(rtol, max_iterations=1000),
        "NystromPCG": NystromPCG(rtol=rtol, max_iterations=1000),
        "Neumann": Neumann(rtol=rtol, max_iterations=1000),
        "Dense": Dense(),
    }
    rows = []
    for name, solver in solvers.items():
        title = f"{curvature}, {name}" if curvature else name
        if name == "Dense" and size > _DENSE_LIMIT:
            rows.append(Candidate(title, None, f"left out: a product for each of {size} parameters"))
        else:
            rows.append(Candidate(curvature if curvature and name == "CG" else title, gradient(solver=solver)))
    return rows


def check_extra(candidates: Iterable[Candidate], extra: Mapping[str, Options] | None) -> dict[str, Options]:
    """The caller's rows, whose names must be new and whose values must be dicts."""
    given, taken = dict(extra or {}), {c.name for c in candidates}
    for name, options in given.items():
        if name in taken:
            raise ValueError(f"extra: '{name}' is a row of the table already; give yours another name")
        if not isinstance(options, Mapping):
            raise TypeError(f"extra['{name}'] must be a dict of keyword arguments, got {type(options).__name__}")
    return given


@contextmanager
def unchanged(*modules: nn.Module) -> Iterator[None]:
    """Put back what `modules` hold, whatever happens inside.

    That is parameters, buffers and gradients, which stay the same objects; which of them require a gradient; and train and
    eval modes.
    """
    layers = list(dict.fromkeys(layer for module in modules for layer in module.modules()))
    holders: list[dict[str, Any]] = [d for layer in layers for d in (layer._parameters, layer._buffers, layer._modules)]
    members = [(held, dict(held)) for held in holders]
    modes = [(layer, layer.training) for layer in layers]
    values = {
        tensor: (tensor.detach().clone(), tensor.requires_grad, tensor.grad, _copy(tensor.grad))
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    }
    try:
        yield
    finally:
        for held, before in members:
            held.clear()
            held.update(before)
        for layer, training in modes:
            layer.training = training
        with torch.no_grad():
            for tensor, (value, requires_grad, gradient, slope) in values.items():
                tensor.copy_(value)
                tensor.requires_grad_(requires_grad)
                tensor.grad = gradient
                if gradient is not None and slope is not None:
                    gradient.copy_(slope)


@contextmanager
def same_parameters(call: str, **modules: nn.Module) -> Iterator[None]:
    """Refuse a call that gives one of `modules`, by their roles, other parameter objects; let it freeze what it likes.

    Raises:
        ValueError: a parameter is another object than before.
    """
    before = {role: dict(module.named_parameters()) for role, module in modules.items()}
    flags = [(p, p.requires_grad) for named in before.values() for p in named.values()]
    yield
    for role, module in modules.items():
        after = dict(module.named_parameters())
        for name in (*before[role], *after):
            if before[role].get(name) is not after.get(name):
                raise ValueError(
                    f"{call} must write into the parameters of {role}, such as by copy_ under torch.no_grad(), but "
                    f"'{name}' is another object than before"
                )
    for parameter, requires_grad in flags:
        parameter.requires_grad_(requires_grad)


@contextmanager
def common_random_numbers(device: torch.device) -> Iterator[None]:
    """The same draws from torch's global generators at each entry; they go on as if nothing had been drawn."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(0)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        yield


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()
