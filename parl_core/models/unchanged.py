"""Whether calling a module is nothing but what its class and its parameters say: what compiled kernels must know."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def parts(module: nn.Module) -> list[nn.Module]:
    """As `list(module.modules())`, in a fraction of its time; a part that occurs twice is given twice."""
    found, waiting = [], [module]
    while waiting:
        part = waiting.pop()
        found.append(part)
        if part._modules:
            waiting.extend([child for child in reversed(part._modules.values()) if child is not None])
    return found


def params_of(module: nn.Module) -> list[Tensor]:
    """As `list(module.parameters())`, in a fraction of its time, for modules that share no parameter."""
    return [param for part in parts(module) for param in part._parameters.values() if param is not None]


def change_of(module: nn.Module, name: str) -> str | None:
    """What makes a call of `module` more than its class and its parameters say, or None if nothing does.

    It may be a hook on all modules, or a hook or a replaced method (an attribute of the instance that hides a callable of
    its class) on the module or a part of it. The types of the parts are not looked at.

    Args:
        name: what the answer calls the module itself; parts go by their own names.
    """
    hooks = torch.nn.modules.module
    if any([getattr(hooks, f"_global{kind}") for kind in _HOOKS]):
        return "hooks are registered on all modules"
    # This is asked before every call of a kernel, so names are looked for only where there is something to tell.
    if not any([_is_changed(part) for part in parts(module)]):
        return None
    for path, part in module.named_modules():
        place = f"'{path}'" if path else name
        if _has_hooks(part):
            return f"hooks are registered on {place}"
        if replaced := _replaced(part):
            return f"{place} has a {replaced[0]} of its own"
    return None


def _is_changed(part: nn.Module) -> bool:
    if _has_hooks(part):
        return True
    kind: type = type(part)
    return not _class_names(kind).isdisjoint(vars(part)) and bool(_replaced(part))


def _has_hooks(part: nn.Module) -> bool:
    return bool(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks)


def _replaced(part: nn.Module) -> list[str]:
    return [key for key, value in vars(part).items() if callable(value) and hasattr(type(part), key)]


@functools.cache
def _class_names(kind: type) -> frozenset[str]:
    return frozenset(dir(kind))
