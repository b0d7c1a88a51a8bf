"""Makes Triton's interpreter fast enough to test with.

Scans take log₂ n steps on whole arrays, where the interpreter takes n · rows on single numbers. That is also nearer to
what a GPU does, since stretches are combined, not only single elements added. And triton.language, which the interpreter
replaces function by function for each call of a `@triton.jit` function, is replaced once for each launch.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def doubling_scan(self: Any, input: Any) -> list[Any]:
    """`ScanOps.generic_scan` by Hillis and Steele, Data parallel algorithms (1986)."""
    arrays = [np.array(operand.handle.data) for operand in input]
    dtypes = [operand.dtype for operand in input]
    axis, length = self.axis, arrays[0].shape[self.axis]
    index = np.arange(length).reshape([-1 if d == axis else 1 for d in range(arrays[0].ndim)])
    step = 1
    while step < length:
        before = [np.roll(array, step, axis) for array in arrays]
        operands = [self.to_tensor(array, dtype) for array, dtype in zip(before + arrays, dtypes * 2, strict=True)]
        combined = self.combine_fn.fn(*operands)
        combined = combined if isinstance(combined, tuple) else (combined,)
        arrays = [
            np.where(index >= step, new.handle.data, array).astype(array.dtype)
            for new, array in zip(combined, arrays, strict=True)
        ]
        step *= 2
    return [self.to_tensor(array, dtype) for array, dtype in zip(arrays, dtypes, strict=True)]


class _Scopes:
    """What is replaced for the launch at hand: `restore`, called once by the launch, ends all of it."""

    def __init__(self, replace: Any, language: Any) -> None:
        self.replace, self.language = replace, language
        self.scopes: list[Any] = []
        self.modules: set[int] = set()

    def __call__(self, function: Any) -> _Scopes:
        seen = function.__globals__.values()
        modules = {id(module) for module in (self.language, self.language.core) if any(x is module for x in seen)}
        if not modules <= self.modules or not self.scopes:
            self.scopes.append(self.replace(function))
            self.modules |= modules
        return self

    def restore(self) -> None:
        while self.scopes:
            self.scopes.pop().restore()
        self.modules.clear()


def install() -> None:
    """Let the interpreter do so, where Triton is installed."""
    try:
        import triton.language
        from triton.runtime import interpreter
    except ImportError:
        return
    interpreter.ScanOps.generic_scan = doubling_scan
    if not isinstance(interpreter._patch_lang, _Scopes):
        interpreter._patch_lang = _Scopes(interpreter._patch_lang, triton.language)
