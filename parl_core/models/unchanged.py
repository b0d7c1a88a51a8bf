"""Whether calling a module is nothing but what its class and its parameters say: what compiled kernels must know."""

from __future__ import annotations

import torch
from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def change_of(module: nn.Module, name: str) -> str | None:
    """What makes a call of `module` more than its class and its parameters say, or None if nothing does.

    It may be a hook on all modules, or a hook or a replaced method (an attribute of the instance that hides a callable of
    its class) on the module or a part of it. The types of the parts are not looked at.

    Args:
        name: what the answer calls the module itself; parts go by their own names.
    """
    hooks = torch.nn.modules.module
    if any(getattr(hooks, f"_global{kind}") for kind in _HOOKS):
        return "hooks are registered on all modules"
    for path, part in module.named_modules():
        place = f"'{path}'" if path else name
        if any(getattr(part, kind) for kind in _HOOKS):
            return f"hooks are registered on {place}"
        replaced = [key for key, value in vars(part).items() if callable(value) and hasattr(type(part), key)]
        if replaced:
            return f"{place} has a {replaced[0]} of its own"
    return None
