"""Hazards that only a call shows: a copy of the module is called, differentiated twice, and held against differences.

How this differs from trying a double backward and catching what it raises, and why:
1. `torch.autograd.grad` visits only what leads to its inputs, so a once-differentiable function does not raise: its
   contribution is silently absent. The graph of the gradient is therefore searched for torch's error node.
2. A backward that multiplies a gradient saved in forward does not raise either. Only numbers show it: H v by double
   backward against (∇(θ + h v) − ∇(θ − h v)) / 2h in float64.
3. A kink that happens to lie within a step of θ spoils such a difference, but hardly along every direction and at a
   thousandth of the step: the best try counts, since a missing term is missing in all.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..captured import MethodCall
from ..flat import flatten, gradients, unflatten
from .findings import Finding, Severity
from .graph import Node, custom_functions, function_of, mark, operation, watched
from .static import DIFFERENTIABLE_BACKWARD, MATH_ATTENTION, custom_function, is_once_differentiable, kink

ERROR, WARNING, NOTE = Severity

_DIRECTIONS = 3
# Step along a unit vector in parameter space, and the relative error above which a product is called wrong.
_STEP_AND_TOLERANCE = {torch.float64: (1e-5, 1e-4), torch.float32: (1e-2, 0.1)}
_FUSED_ATTENTION = ("ScaledDotProduct", "FlashAttention", "EfficientAttention", "CudnnAttention")
_KINKED = (
    "Relu", "LeakyRelu", "RreluWithNoise", "PreluKernel", "Hardtanh", "Hardswish", "Hardshrink", "Softshrink",
    "Threshold", "MaxPool", "AdaptiveMaxPool", "FractionalMaxPool", "Abs", "Clamp", "ClampMin", "ClampMax", "Maximum",
    "Minimum", "Amax", "Amin", "Max", "Min",
)  # fmt: skip
_SINGULAR = (
    "Sqrt", "Rsqrt", "LinalgVectorNorm", "Norm", "Pow", "Log", "Log2", "Log10", "Log1P", "Xlogy", "Acos", "Asin", "Atanh",
    "Acosh", "Atan2", "Div", "Reciprocal", "EuclideanDist", "CdistBackward", "Prod", "Std", "Var",
)  # fmt: skip


def examine_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], method: str
) -> tuple[set[str] | None, list[Finding]]:
    """Call a copy of `module.method(*args, **kwargs)`.

    Returns the kinds of static suspicion that this settles, None if it could not be called, and what was seen.
    """
    try:
        native = _Subject(copy.deepcopy(module), args, kwargs, method)
    except Exception as error:
        what = f"The module cannot be copied ({_first_line(error)}), so it was not called."
        return None, [Finding(WARNING, "not checked", "", what, "Make copy.deepcopy(module) work.")]
    devices = sorted({p.device.index or 0 for p in native.params if p.is_cuda})
    with torch.random.fork_rng(devices):
        try:
            first, other, again = native(seed=0), native(seed=1), native(seed=0)
        except Exception as error:
            what = f"{method}(*example_inputs) raised {type(error).__name__}: {_first_line(error)}"
            return None, [Finding(ERROR, "call", "", what, "Pass example inputs that the method takes.")]
        if not first:
            what = f"The output of {method} depends on no trainable parameter through autograd."
            instead = "Compute it in torch from the parameters, without detach(), no_grad() or NumPy."
            return None, [Finding(ERROR, "no gradient", "", what, instead)]
        if not all(torch.isfinite(y).all() for y in first):
            what = f"The output of {method} is NaN or infinite on the example inputs."
            return None, [Finding(ERROR, "non-finite", "", what, "Pass example inputs on which the output is finite.")]
        repeatable = _same(first, again)
        found = []
        if not repeatable:
            what = "Two calls with the same inputs and random state differ, so the module carries state between calls."
            found.append(
                Finding(ERROR, "random", "", what, "Make the output a function of parameters and inputs alone.")
            )
        elif not _same(first, other):
            what = "Two calls with the same inputs differ: the output is random."
            found.append(Finding(ERROR, "random", "", what, "Call .eval(), or take the noise as an input."))
        graph = native.graph()
        found += _read_graph(graph, method)
        broken = list(_double_backward(native, graph))
        found += broken
        # With dropout attention may take another kernel than it will in eval mode.
        settled = set() if found else {"attention"}
        if repeatable and not broken:
            verdict = list(_canary(module, native, graph))
            found += verdict
            if all(f.kind != "not checked" for f in verdict):
                settled.add("custom function")
        if repeatable:
            found += _forward_mode(native)
    return settled, found


class _Subject:
    """A copy of the module with the inputs that it is called on; its parameters may be moved."""

    def __init__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        method: str,
        dtype: torch.dtype | None = None,
    ) -> None:
        def own(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return copy.deepcopy(value)
            return value.detach().clone().to(dtype if dtype and value.is_floating_point() else value.dtype)

        self.module = module.to(dtype) if dtype else module
        self.args, self.kwargs, self.method = tree_map(own, args), tree_map(own, kwargs), method
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.names, self.params = list(named), list(named.values())

    def __call__(self, seed: int = 0) -> list[Tensor]:
        """The differentiable outputs, always with the same draws for the same seed."""
        torch.manual_seed(seed)
        return _differentiable(getattr(self.module, self.method)(*self.args, **self.kwargs))

    def at(self, shifted: list[Tensor], weights: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Outputs and the gradient of their weighted sum at other parameters."""
        kept = [p.detach().clone() for p in self.params]
        self._set(shifted)
        try:
            outputs = self()
            return [y.detach() for y in outputs], flatten(gradients(outputs, self.params, weights)).detach()
        finally:
            self._set(kept)

    def graph(self) -> dict[Node, str]:
        """Every node between the parameters and the outputs, with the path of the module that made it."""
        places: dict[Node, str] = {}
        with watched(self.module, places):
            mark(self(), "", places)
        return places

    def _set(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for p, value in zip(self.params, values, strict=True):
                p.copy_(value)


def _read_graph(graph: dict[Node, str], method: str) -> Iterator[Finding]:
    for node, where in graph.items():
        name = operation(node)
        cls = function_of(node)
        if cls is not None:
            finding = custom_function(where, cls)
            # A Function that is differentiable is left to the canary.
            if finding.severity is ERROR:
                yield finding
        elif name.startswith(_FUSED_ATTENTION):
            what = f"Attention ran in a fused kernel ({name}) that has no double backward."
            yield Finding(ERROR, "attention", where, what, f"For attention: {MATH_ATTENTION}.")
        elif name.startswith("CudnnRnn"):
            what = "The recurrent layer ran in cuDNN, which has no double backward."
            instead = "Differentiate under torch.backends.cudnn.flags(enabled=False)."
            yield Finding(ERROR, "recurrent", where, what, instead)
        elif name.rstrip("123D") in _KINKED or name.startswith(("MaxPool", "AdaptiveMaxPool")):
            yield kink(where, name, method)


def _double_backward(native: _Subject, graph: dict[Node, str]) -> Iterator[Finding]:
    """Errors of the derivatives in the module's own dtype, whose kernels may differ from those of float64."""
    outputs = native()
    weights = [torch.randn_like(y).requires_grad_() for y in outputs]
    try:
        first = gradients(outputs, native.params, weights, create_graph=True)
    except RuntimeError as error:
        yield Finding(ERROR, "no backward", "", f"Backward raises: {_first_line(error)}", _instead(graph))
        return
    nodes: dict[Node, str] = {}
    mark(first, "", nodes)
    if any(node.name().endswith("::Error") for node in nodes):
        marked = [(f, w) for n, w in graph.items() if (f := function_of(n)) and is_once_differentiable(f)]
        if not marked:
            what = (
                "A backward gives a gradient that cannot be differentiated, and torch.autograd.grad drops it silently."
            )
            yield Finding(ERROR, "once-differentiable", _suspect_place(graph), what, _instead(graph))
        else:
            yield from (custom_function(where, cls) for cls, where in marked)
        return
    if not all(torch.isfinite(g).all() for g in first):
        yield _non_finite("first", native, first, graph)
        return
    try:
        second = gradients(first, [*weights, *native.params], [torch.randn_like(g) for g in first])
    except RuntimeError as error:
        what = f"Double backward raises: {_first_line(error)}"
        yield Finding(ERROR, "no double backward", _suspect_place(graph), what, _instead(graph))
        return
    if not all(torch.isfinite(h).all() for h in second):
        yield _non_finite("second", native, second[len(weights) :], graph)


def _canary(module: nn.Module, native: _Subject, graph: dict[Node, str]) -> Iterator[Finding]:
    subject = native
    try:
        candidate = _Subject(copy.deepcopy(module), native.args, native.kwargs, native.method, torch.float64)
        candidate()
        subject = candidate
    except Exception:  # a kernel without float64: the native dtype must do
        pass
    precision = _lowest_precision(subject)
    if precision not in _STEP_AND_TOLERANCE:
        what = f"It computes in {precision}, too coarse to compare with finite differences."
        yield Finding(WARNING, "not checked", "", what, "Pass a module that computes in float32 or float64.")
        return
    step, tolerance = _STEP_AND_TOLERANCE[precision]
    tries = [_compare(subject, seed, step, torch.finfo(precision).eps) for seed in range(_DIRECTIONS)]
    if precision is torch.float64 and not min(t.hessian for t in tries) <= tolerance:
        tries += [_compare(subject, seed, 1e-3 * step, torch.finfo(precision).eps) for seed in range(_DIRECTIONS)]
    best = _Errors(*(min(errors) for errors in zip(*tries, strict=True)))
    where = _suspect_place(graph)
    # `not <=`, so that NaN counts as wrong.
    if not best.gradient <= tolerance:
        yield Finding(
            ERROR, "canary", where,
            f"The gradient is not the derivative of the output (relative error {best.gradient:.1e} against finite "
            "differences): something in it is detached, straight-through or has a wrong backward.",
            _instead(graph, "Remove detach(), no_grad() and straight-through estimators from what is differentiated."),
        )  # fmt: skip
    elif not best.transpose <= tolerance:
        yield Finding(
            ERROR, "canary", where,
            f"J v by double backward is wrong (relative error {best.transpose:.1e}): a backward does not depend "
            "differentiably on the gradient that it is given.",
            _instead(graph),
        )  # fmt: skip
    elif not best.hessian <= tolerance:
        yield Finding(
            ERROR, "canary", where,
            f"H v by double backward is wrong (relative error {best.hessian:.1e} against finite differences of the "
            "gradient): a backward drops a second-derivative term silently, as fused losses do.",
            _instead(graph, "Find what computes its gradient in forward or detaches it, and use the plain torch form."),
        )  # fmt: skip


class _Errors(NamedTuple):
    gradient: float
    transpose: float
    hessian: float


def _compare(subject: _Subject, seed: int, step: float, eps: float) -> _Errors:
    """Relative errors of ⟨∇f, v⟩, ⟨w, J v⟩ and H v for f = Σ w·outputs along a random unit v."""
    outputs = subject()
    torch.manual_seed(1000 + seed)
    weights = [torch.randn_like(y).requires_grad_() for y in outputs]
    size = sum(p.numel() for p in subject.params)
    v = torch.randn(size, dtype=subject.params[0].dtype, device=subject.params[0].device)
    v /= v.norm()
    tangents = unflatten(v, subject.params)
    first = gradients(outputs, subject.params, weights, create_graph=True)
    products = gradients(first, [*weights, *subject.params], tangents)
    score = flatten(first).detach()
    slope = score @ v
    transposed = sum((w.detach() * j).sum() for w, j in zip(weights, products, strict=False))
    hessian = flatten(products[len(weights) :])

    fixed = [w.detach() for w in weights]
    here = [p.detach().clone() for p in subject.params]
    above, gradient_above = subject.at([p + step * t for p, t in zip(here, tangents, strict=True)], fixed)
    below, gradient_below = subject.at([p - step * t for p, t in zip(here, tangents, strict=True)], fixed)
    rise = sum((w * (a - b)).sum() for w, a, b in zip(fixed, above, below, strict=True))
    # What rounding alone makes of a difference.
    noise = 100 * eps / (2 * step)
    size_of_value = sum(float((w * y).abs().sum()) for w, y in zip(fixed, above, strict=True))
    return _Errors(
        gradient=_relative_error(slope, torch.as_tensor(rise) / (2 * step), noise * size_of_value),
        transpose=_relative_error(torch.as_tensor(transposed), slope, 100 * eps * float(score.norm())),
        hessian=_relative_error(hessian, (gradient_above - gradient_below) / (2 * step), noise * float(score.norm())),
    )


def _relative_error(value: Tensor, reference: Tensor, noise: float) -> float:
    difference = float((value - reference).norm())
    scale = max(float(value.norm()), float(reference.norm()))
    return 0.0 if difference <= noise else difference / scale


def _forward_mode(native: _Subject) -> Iterator[Finding]:
    method = MethodCall(native.module)
    names = [f"module.{name}" for name in native.names]

    def call(*params: Tensor) -> list[Tensor]:
        torch.manual_seed(0)
        state = dict(zip(names, params, strict=True))
        result = functional_call(method, state, (native.method, *native.args), native.kwargs)
        return [y for y in tree_leaves(result) if isinstance(y, Tensor) and y.is_floating_point()]

    params = tuple(p.detach() for p in native.params)
    try:
        call(*params)
    except Exception as error:
        what = f"torch.func.functional_call, which the engine uses, fails on it: {_first_line(error)}"
        yield Finding(ERROR, "functional call", "", what, "Read the parameters as attributes of modules in every call.")
        return
    try:
        torch.func.jvp(call, params, params)
    except Exception as error:
        what = f"It has no forward-mode derivative ({_first_line(error)}); the engine takes J v by double backward."
        yield Finding(NOTE, "forward mode", "", what, "Nothing is needed, unless you call torch.func.jvp yourself.")


def _non_finite(order: str, native: _Subject, pieces: Iterable[Tensor], graph: dict[Node, str]) -> Finding:
    bad = [n for n, piece in zip(native.names, pieces, strict=True) if not torch.isfinite(piece).all()]
    singular = {operation(n).rstrip("0123456789"): w for n, w in graph.items() if operation(n).startswith(_SINGULAR)}
    causes = f"; singular at the edge of their domain: {', '.join(singular)}" if singular else ""
    of = f" of {', '.join(bad[:3])}{' …' if len(bad) > 3 else ''}" if bad else ""
    return Finding(
        ERROR, "non-finite", next(iter(singular.values()), ""),
        f"The {order} derivatives{of} are NaN or infinite while the output is finite{causes}.",
        "Keep the argument inside the domain: sqrt(x² + ε) for a norm at 0, a clamp before log, torch.where on the "
        "argument and not only on the result.",
    )  # fmt: skip


def _lowest_precision(subject: _Subject) -> torch.dtype:
    """The coarsest floating-point dtype that a call computes in, whatever the parameters are stored in."""

    class Record(TorchDispatchMode):
        coarsest = subject.params[0].dtype

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel():
                    self.coarsest = max(self.coarsest, leaf.dtype, key=lambda dtype: torch.finfo(dtype).eps)
            return result

    with Record() as record:
        subject()
    return record.coarsest


def _differentiable(result: Any) -> list[Tensor]:
    leaves = [y for y in tree_leaves(result) if isinstance(y, Tensor)]
    return [y for y in leaves if y.is_floating_point() and y.requires_grad and y.numel()]


def _suspect_place(graph: dict[Node, str]) -> str:
    fused = [where for node, where in graph.items() if operation(node).startswith((*_FUSED_ATTENTION, "CudnnRnn"))]
    return next(iter([*custom_functions(graph).values(), *fused]), "")


def _instead(graph: dict[Node, str], otherwise: str = "Use a form of that operation built from plain torch.") -> str:
    custom = custom_functions(graph)
    return f"For {', '.join(custom)}: {DIFFERENTIABLE_BACKWARD}." if custom else otherwise


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    if [y.shape for y in left] != [y.shape for y in right]:
        return False
    # Room for atomics: the order of a GPU's additions is not fixed.
    return all(
        float((a - b).detach().abs().max()) <= 1e3 * torch.finfo(a.dtype).eps * float(a.detach().abs().max() + 1e-30)
        for a, b in zip(left, right, strict=True)
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0]
    return line if len(line) <= 160 else line[:159] + "…"
