"""Log-probabilities of tokens from logits (T, V): value, VJP, JVP and HVP, in bfloat16 and float32.

With p = softmax(logits), e_a the token's unit vector and a cotangent w (T,): the VJP is w(e_a − p), the JVP along a tangent
z' is z'_a − p·z', and the HVP, the VJP's derivative along z', is −w p⊙(z' − p·z'). The floor counts, at the speed of a copy,
the logits, the tangent and the result each once: an HVP in two passes reads the logits twice, and stays above it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.case import Bar, Case, Lab, Run, Setup, by_backend
from benchmarks.harness import Absent, Peer, WrongAnswer, agrees_with, copy_floor
from parl_core import ops

SIZES = ((2048, 32768), (16384, 32768), (2048, 131072), (16384, 131072))
TINY = ((5, 70),)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
RTOL = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
_OPS = {"value": "", "vjp": ", gradient", "jvp": ", along a tangent", "hvp": ", second order"}
EAGER = "torch, three passes"
_LARGE_TENSORS = {"value": 1, "vjp": 2, "jvp": 2, "hvp": 3}
"""Of (T, V), read or written."""


def cases(tiny: bool) -> list[Case]:
    """HVPs first, since they have the bar."""
    return [
        Case(
            topic="token_log_prob",
            name=f"{what} {name} {steps}x{vocabulary}",
            setup=partial(_setup, what, dtype, steps, vocabulary),
            tests=("categorical", "configurations"),
            bars=(Bar(1.3, peers=(EAGER,)),) if what == "hvp" else (),
            op="categorical_log_prob" + _OPS[what],
            size=steps * vocabulary,
            first=(what, dtype, steps, vocabulary) == ("hvp", torch.bfloat16, 16384, 32768),
        )
        for what in ("hvp", "value", "vjp", "jvp")
        for steps, vocabulary in (TINY if tiny else SIZES)
        for name, dtype in DTYPES.items()
        # Of the largest there is one precision: with all contestants' intermediates single would not fit.
        if dtype is torch.bfloat16 or steps * vocabulary < 1 << 31
    ]


def _setup(what: str, dtype: torch.dtype, steps: int, vocabulary: int, lab: Lab) -> Setup:
    generator = torch.Generator(lab.device).manual_seed(0)
    logits, tangent = (
        torch.randn(steps, vocabulary, generator=generator, device=lab.device).to(dtype) for _ in range(2)
    )
    actions = torch.randint(vocabulary, (steps,), generator=generator, device=lab.device)
    weights = torch.randn(steps, generator=generator, device=lab.device)
    data = (logits, actions, weights, tangent)

    def plain(answers: Callable[..., Any]) -> Callable[[], Run]:
        return lambda: lambda: answers(*data)

    return Setup(
        check=_in_rows(what, data, RTOL[dtype]),
        ours=by_backend(lambda backend: _ours(what, *data, backend)),
        peers={
            EAGER: plain(_EAGER[what]),
            **({"torch, p kept": Peer(lambda: _kept(*data), "keeps (T, V) numbers")} if what == "hvp" else {}),
            "torch.compile": lambda: partial(torch.compile(_EAGER[what], dynamic=False), *data),
            **({"torch cross_entropy": plain(_cross_entropy)} if what == "value" else {}),
        },
        floor=copy_floor(_LARGE_TENSORS[what] * logits.nbytes, device=lab.device),
        cold=True,
    )


def _in_rows(what: str, data: tuple[Tensor, ...], rtol: float) -> Callable[[Any], float]:
    """Against float64, in pieces of rows: as a whole that would not fit the GPU beside everything else."""
    pieces = max(1, data[0].numel() >> 27)

    def check(answer: Any) -> float:
        if not isinstance(answer, Tensor) or len(answer) != len(data[0]):
            raise WrongAnswer(f"an answer for {len(data[0])} steps was expected, got {type(answer).__name__}")
        expected = (
            _EAGER[what](*(part.double() if part.is_floating_point() else part for part in parts))
            for parts in zip(*(tensor.chunk(pieces) for tensor in data), strict=True)
        )
        return max(agrees_with(exact, rtol)(part) for exact, part in zip(expected, answer.chunk(pieces), strict=True))

    return check


def _ours(what: str, logits: Tensor, actions: Tensor, weights: Tensor, tangent: Tensor, backend: str) -> Run:
    op: Callable[..., Tensor] | None = getattr(ops, "categorical_log_prob", None)
    if op is None:
        raise Absent("there is no such op")
    function = partial(op, actions=actions, backend=backend)
    if what == "value":
        return lambda: function(logits)
    if what == "jvp":
        return lambda: torch.func.jvp(function, (logits,), (tangent,))[1]
    leaf = logits.clone().requires_grad_()
    values = function(leaf)
    cotangent = weights.to(values.dtype)
    if what == "vjp":
        return lambda: torch.autograd.grad(values, leaf, cotangent, retain_graph=True)[0]
    (gradient,) = torch.autograd.grad(values, leaf, cotangent, create_graph=True)
    return lambda: torch.autograd.grad(gradient, leaf, tangent, retain_graph=True)[0]


def _value(logits: Tensor, actions: Tensor, weights: Tensor, tangent: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(1, actions[:, None])[:, 0]


def _cross_entropy(logits: Tensor, actions: Tensor, weights: Tensor, tangent: Tensor) -> Tensor:
    return -F.cross_entropy(logits, actions, reduction="none")


def _vjp(logits: Tensor, actions: Tensor, weights: Tensor, tangent: Tensor) -> Tensor:
    probabilities = logits.softmax(-1)
    unit = torch.zeros_like(logits).scatter_(1, actions[:, None], 1.0)
    return weights[:, None].to(logits.dtype) * (unit - probabilities)


def _jvp(logits: Tensor, actions: Tensor, weights: Tensor, tangent: Tensor) -> Tensor:
    probabilities = logits.softmax(-1)
    return tangent.gather(1, actions[:, None])[:, 0] - (probabilities * tangent).sum(-1)


def _hvp(logits: Tensor, actions: Tensor, weights: Tensor, tangent: Tensor) -> Tensor:
    """A pass for p, one for p·z', one for the product."""
    probabilities = logits.softmax(-1)
    along = (probabilities * tangent).sum(-1, keepdim=True)
    return -weights[:, None].to(logits.dtype) * probabilities * (tangent - along)


def _kept(logits: Tensor, actions: Tensor, weights: Tensor, tangent: Tensor) -> Run:
    probabilities, scale = logits.softmax(-1), -weights[:, None].to(logits.dtype)
    return lambda: scale * probabilities * (tangent - (probabilities * tangent).sum(-1, keepdim=True))


_EAGER: dict[str, Callable[..., Tensor]] = {"value": _value, "vjp": _vjp, "jvp": _jvp, "hvp": _hvp}
