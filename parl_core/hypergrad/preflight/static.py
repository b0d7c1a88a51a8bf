"""Hazards that show without a call: in the submodules, their parameters, and the code of their methods."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from .findings import Finding, Severity

ERROR, WARNING, NOTE = Severity

# With an error of one of these kinds the module is not called: the call would start communication, a compiler, or fail.
UNCALLABLE = ("sharding", "compiled", "scripted", "quantised", "parameters", "frozen")

MATH_ATTENTION = (
    "call it under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or write out softmax(q kᵀ / √d) v, "
    "both twice differentiable"
)
DIFFERENTIABLE_BACKWARD = (
    "write its backward in differentiable torch operations on saved inputs (never on a gradient computed in forward), "
    "or use the plain torch form"
)

_KINKED = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.SELU, nn.Hardtanh, nn.Hardswish, nn.Hardshrink,
    nn.Softshrink, nn.Threshold, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d,
)  # fmt: skip
_FUSED_LIBRARIES = ("flash_attn", "xformers", "liger_kernel", "apex", "transformer_engine", "flashinfer")
_QUANTISED = ("torch.ao.nn.", "torch.nn.quantized", "torchao.", "bitsandbytes.", "torch.ao.quantization")


def examine_modules(module: nn.Module, method: str) -> list[Finding]:
    """All findings from the modules, their parameters and their code."""
    paths = list(module.named_modules())
    found = [f for path, m in paths for f in (*_wrappers(path, m), *_layers(path, m), *_code(path, m))]
    found += [kink(path, type(m).__name__, method) for path, m in paths if isinstance(m, _KINKED)]
    found += _attention(paths)
    found += _parameters(module)
    return found


def kink(where: str, name: str, method: str) -> Finding:
    """A piecewise smooth operation: right almost everywhere, blind at the kinks."""
    if method == "log_prob":
        return Finding(
            WARNING, "non-smooth", where,
            f"{name} has kinks, whose curvature ∇² log π misses; harmless with Fisher or Identity curvature, which need "
            "first derivatives only.",
            "Use tanh, SiLU, GELU or softplus (average pooling for a max) with ScoreHessian or LogProbHessian.",
        )  # fmt: skip
    return Finding(
        NOTE, "non-smooth", where,
        f"{name} has kinks, whose curvature second derivatives miss; harmless in a reward, of which hypergradient() takes "
        "first derivatives only.",
        "Use tanh, SiLU, GELU or softplus (average pooling for a max) where this module's own Hessian is needed.",
    )  # fmt: skip


def custom_function(where: str, cls: type[Function]) -> Finding:
    """A Python autograd Function, judged by its declaration alone."""
    if cls.__qualname__ == "CheckpointFunction" and cls.__module__.startswith("torch."):
        return Finding(
            ERROR, "once-differentiable", where,
            "Reentrant activation checkpointing cannot be differentiated twice, nor by torch.autograd.grad.",
            "Pass use_reentrant=False to torch.utils.checkpoint.checkpoint.",
        )  # fmt: skip
    if is_once_differentiable(cls):
        return Finding(
            ERROR, "once-differentiable", where,
            f"{cls.__qualname__}.backward is marked once_differentiable: torch.autograd.grad with inputs then drops its "
            "second derivative without a word.",
            f"For {cls.__qualname__}: {DIFFERENTIABLE_BACKWARD}.",
        )  # fmt: skip
    return Finding(
        WARNING, "custom function", where,
        f"{cls.__qualname__} is a custom autograd Function; if it computes its gradient in forward (as fused losses do), "
        "second derivatives lose that term silently.",
        f"Pass example inputs, so that it is checked against finite differences; if it fails, {DIFFERENTIABLE_BACKWARD}.",
    )  # fmt: skip


def is_once_differentiable(cls: type[Function]) -> bool:
    """Whether `backward` is wrapped by `once_differentiable`, which leaves its own code object around the function."""
    code = getattr(cls.backward, "__code__", None)
    return hasattr(cls.backward, "__wrapped__") and code in once_differentiable.__code__.co_consts


def _wrappers(path: str, module: nn.Module) -> Iterator[Finding]:
    # By name: importing torch.distributed or the compiler only to ask costs seconds.
    bases = {c.__name__ for c in type(module).__mro__ if c.__module__.startswith("torch.")}
    if bases & {"FullyShardedDataParallel", "FSDPModule"}:
        form = "FSDP2" if "FSDPModule" in bases else "FSDP"
        yield Finding(
            ERROR, "sharding", path,
            f"{form} raises in double backward, since its shards are gathered and freed by first-order hooks.",
            "Differentiate the unsharded module, or use a first-order estimator.",
        )  # fmt: skip
    if "DistributedDataParallel" in bases:
        yield Finding(
            ERROR, "sharding", path,
            "DistributedDataParallel does not synchronise gradients of gradients: each rank solves its own problem.",
            "Differentiate .module on each rank and all-reduce the products (or the hypergradient) yourself.",
        )  # fmt: skip
    if "DataParallel" in bases:
        yield Finding(
            ERROR, "sharding", path,
            "DataParallel scatters steps over devices, which cuts trajectories apart; it is not tested with the engine.",
            "Differentiate .module.",
        )  # fmt: skip
    if "OptimizedModule" in bases or getattr(module, "_compiled_call_impl", None) is not None:
        yield Finding(
            ERROR, "compiled", path,
            "A torch.compile-d module has no double backward: AOTAutograd raises at the second derivative.",
            "Differentiate the module as it was before torch.compile (._orig_mod), and compile only for rollouts.",
        )  # fmt: skip
    if "ScriptModule" in bases:
        yield Finding(
            ERROR, "scripted", path,
            "A torch.jit module is refused by torch.func.functional_call, which the engine uses.",
            "Differentiate the Python module that was scripted or traced.",
        )  # fmt: skip
    if any("Fake" in c.__name__ and "Quantize" in c.__name__ for c in type(module).__mro__):
        yield Finding(
            ERROR, "quantised", path,
            "Fake quantisation is a straight-through estimator: its gradient is not the derivative of its output.",
            "Differentiate the floating-point module, and quantise after training.",
        )  # fmt: skip
    elif type(module).__module__.startswith(_QUANTISED) and ".qat." not in type(module).__module__:
        yield Finding(
            ERROR, "quantised", path,
            f"{type(module).__name__} holds quantised weights, through which nothing is differentiated.",
            "Differentiate the floating-point module, and quantise after training.",
        )  # fmt: skip


def _layers(path: str, module: nn.Module) -> Iterator[Finding]:
    name = type(module).__name__
    training = module.training
    rate = getattr(module, "p", 0.0) if isinstance(module, nn.modules.dropout._DropoutNd) else 0.0
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        rate = module.dropout
    if training and (rate or isinstance(module, nn.RReLU)):
        yield Finding(
            ERROR, "dropout", path,
            f"{name} in train mode draws anew at every call: log-probabilities are random and their products inconsistent.",
            "Call .eval() before differentiating, or set its probability to 0.",
        )  # fmt: skip
    batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    if batch_norm and (training or not module.track_running_stats):
        yield Finding(
            ERROR, "batch norm", path,
            f"{name} normalises by the batch: each log-probability depends on all rows, and on how they are cut up.",
            "Call .eval() so that running statistics are used, or use LayerNorm.",
        )  # fmt: skip
    if getattr(module, "inplace", False) is True:
        yield Finding(
            WARNING, "in-place", path,
            f"{name}(inplace=True) overwrites its input; autograd raises if that was saved for a backward.",
            "Use inplace=False.",
        )  # fmt: skip
    if isinstance(module, nn.Hardsigmoid):
        yield Finding(
            ERROR, "no double backward", path, "Hardsigmoid has no second derivative in torch.", "Use Sigmoid."
        )
    if isinstance(module, nn.RNNBase) and torch.backends.cudnn.enabled:
        on_gpu = any(p.is_cuda for p in module.parameters())
        yield Finding(
            ERROR if on_gpu else NOTE, "recurrent", path,
            f"{name} on a GPU runs in cuDNN, which has no double backward.",
            "Differentiate under torch.backends.cudnn.flags(enabled=False).",
        )  # fmt: skip
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        if module.sparse:
            yield Finding(ERROR, "embedding", path, "Sparse gradients have no double backward.", "Use sparse=False.")
        if module.max_norm is not None:
            yield Finding(
                ERROR, "embedding", path,
                "max_norm rescales the weights in place during forward, behind autograd's back.",
                "Use max_norm=None, and rescale between steps.",
            )  # fmt: skip
    spectral = any(type(hook).__name__ == "SpectralNorm" for hook in module._forward_pre_hooks.values())
    if (spectral or type(module).__name__ == "_SpectralNorm") and training:
        yield Finding(
            ERROR, "parametrization", path,
            "Spectral norm in train mode moves its singular vectors at every call: the function changes under the solve.",
            "Call .eval() before differentiating.",
        )  # fmt: skip
    if _fused_weight_norm(module):
        yield Finding(
            ERROR, "parametrization", path,
            "Weight norm over the first or last dimension runs fused, and its double backward is silently wrong: it takes "
            "the norm for a constant.",
            "Register a parametrization of your own that returns g * v / v.norm(dim=…, keepdim=True).",
        )  # fmt: skip
    if parametrize.is_parametrized(module):
        tensors = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        yield Finding(
            NOTE, "parametrization", path,
            f"{tensors} is computed from other parameters, and it is those that the flat vector and damping refer to.",
            "To work in the plain weights, call torch.nn.utils.parametrize.remove_parametrizations.",
        )  # fmt: skip


def _fused_weight_norm(module: nn.Module) -> bool:
    """torch._weight_norm fuses over the first and last dimension; gradgradcheck fails for those and no others."""
    cases: list[tuple[int, Any]] = []
    lists: Any = getattr(module, "parametrizations", {}) if parametrize.is_parametrized(module) else {}
    for parameters in lists.values():
        cases += [(p.dim, parameters.original1) for p in parameters if type(p).__name__ == "_WeightNorm"]
    hooks: list[Any] = [h for h in module._forward_pre_hooks.values() if type(h).__name__ == "WeightNorm"]
    cases += [(hook.dim, getattr(module, f"{hook.name}_v")) for hook in hooks]
    return any(dim in (0, weight.ndim - 1) for dim, weight in cases)


def _attention(paths: list[tuple[str, nn.Module]]) -> Iterator[Finding]:
    cuda = torch.backends.cuda
    names = (("flash", cuda.flash_sdp_enabled()), ("memory-efficient", cuda.mem_efficient_sdp_enabled()),
             ("cuDNN", cuda.cudnn_sdp_enabled()))  # fmt: skip
    enabled = [name for name, on in names if on]
    if not enabled:
        return
    code = {path: _reachable(m) for path, m in paths}
    restricted = any("sdpa_kernel" in seen for seen, _ in code.values())
    kernels = f"{', '.join(enabled)} attention, which {'has' if len(enabled) == 1 else 'have'} no double backward"
    layers = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    owned = {id(sub) for _, m in paths if isinstance(m, layers) for sub in m.modules() if sub is not m}
    for path, module in paths:
        certain = isinstance(module, layers) or "scaled_dot_product_attention" in code[path][0]
        possible = isinstance(module, nn.MultiheadAttention) and id(module) not in owned
        if not (certain or possible):
            continue
        when = "" if certain else " when called with need_weights=False"
        unless = ", unless its own use of sdpa_kernel prevents that: pass example inputs to see" if restricted else ""
        yield Finding(
            ERROR if certain and not restricted else WARNING, "attention", path,
            f"{type(module).__name__}{when} may run in {kernels}{unless}.",
            f"For attention: {MATH_ATTENTION}.",
        )  # fmt: skip


def _parameters(module: nn.Module) -> Iterator[Finding]:
    named = dict(module.named_parameters())
    trainable = {name: p for name, p in named.items() if p.requires_grad}
    for name, p in named.items():
        if isinstance(p, nn.parameter.UninitializedParameter) or p.is_meta:
            yield Finding(ERROR, "parameters", name, "It has no values yet.", "Run the module once, or materialise it.")
        elif type(p).__name__ == "DTensor" or type(p.data).__name__ == "DTensor":
            yield Finding(
                ERROR, "sharding", name, "It is a sharded DTensor, which the flat parameter vector cannot hold.",
                "Gather it (full_tensor()), or use a first-order estimator.",
            )  # fmt: skip
        elif p.is_complex() and p.requires_grad:
            yield Finding(
                ERROR, "parameters", name, "It is complex; the engine's parameters are real.",
                "Hold its real and imaginary parts (torch.view_as_real).",
            )  # fmt: skip
        elif not p.is_floating_point():
            yield Finding(
                WARNING, "parameters", name, f"It is {p.dtype}, so it is held constant (are the weights quantised?).",
                "Use floating-point weights, or a buffer for a constant.",
            )  # fmt: skip
        elif p.requires_grad and p.dtype in (torch.float16, torch.bfloat16):
            yield Finding(
                WARNING, "precision", name, f"Second derivatives in {p.dtype} keep two or three digits.",
                "Differentiate a float32 or float64 copy.",
            )  # fmt: skip
    if len({(p.dtype, p.device) for p in trainable.values()}) > 1:
        yield Finding(
            ERROR, "parameters", "", "The trainable parameters differ in dtype or device.",
            "Move the module to one of each with .to().",
        )  # fmt: skip
    if not trainable:
        yield Finding(
            ERROR, "frozen", "", "No parameter requires a gradient, so there is nothing to differentiate.",
            "Call requires_grad_() on the parameters to be differentiated.",
        )  # fmt: skip
    elif len(trainable) < len(named):
        yield Finding(
            NOTE, "frozen", "", f"{len(named) - len(trainable)} of {len(named)} parameters are frozen and left out.",
            "Call requires_grad_() on those that should take part.",
        )  # fmt: skip


def _code(path: str, module: nn.Module) -> Iterator[Finding]:
    _, objects = _reachable(module)
    for obj in objects:
        library = (getattr(obj, "__module__", None) or "").split(".")[0]
        name = getattr(obj, "__qualname__", str(obj))
        if library in _FUSED_LIBRARIES:
            yield Finding(
                WARNING, "custom function", path,
                f"{library}.{name} is a fused kernel; those seldom have a second derivative, and some lose it silently.",
                "Use the plain torch form, or pass example inputs to check it against finite differences.",
            )  # fmt: skip
        elif isinstance(obj, type):
            yield custom_function(path, obj)


def _reachable(module: nn.Module) -> tuple[set[str], list[Any]]:
    """Names that the code of a user's module class mentions, and the autograd Functions and fused kernels among them.

    Follows plain functions that the methods mention; reads code objects, runs nothing.
    """
    functions: list[types.FunctionType] = []
    for cls in type(module).__mro__:
        if not cls.__module__.startswith(("torch.", "builtins", "parl_core.")):
            for member in vars(cls).values():
                plain = getattr(member, "fget", None) or getattr(member, "__func__", member)
                functions += [plain] if isinstance(plain, types.FunctionType) else []
    names: set[str] = set()
    found: dict[int, Any] = {}
    visited = {id(f) for f in functions}
    pending: list[Any] = [value for value in vars(module).values() if inspect.isroutine(value)]
    while functions or pending:
        if not pending:
            function = functions.pop()
            mentioned, objects = _mentioned(function)
            names |= mentioned
            pending += objects
            continue
        obj = pending.pop()
        owner = getattr(obj, "__self__", None)
        obj = owner if inspect.ismethod(obj) and isinstance(owner, type) else inspect.unwrap(obj)
        home = (getattr(obj, "__module__", None) or "").split(".")[0]
        if home in ("torch", "parl_core"):
            continue
        if (isinstance(obj, type) and issubclass(obj, Function)) or home in _FUSED_LIBRARIES:
            found[id(obj)] = obj
        elif isinstance(obj, types.FunctionType) and id(obj) not in visited and len(visited) < 500:
            visited.add(id(obj))
            functions.append(obj)
    return names, list(found.values())


def _mentioned(function: types.FunctionType) -> tuple[set[str], list[Any]]:
    codes, names = [function.__code__], set[str]()
    for code in codes:
        names |= {*code.co_names, *code.co_freevars}
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    scope = {**function.__globals__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            scope[name] = cell.cell_contents
        except ValueError:  # the cell is still empty
            continue
    objects = [scope[name] for name in names if name in scope]
    for namespace in [o for o in objects if isinstance(o, (types.ModuleType, type))]:
        if not namespace.__name__.startswith(("torch", "numpy")):
            objects += [vars(namespace)[name] for name in names if name in vars(namespace)]
    callables = [o for o in objects if isinstance(o, type) or inspect.isroutine(o)]
    return names, callables
