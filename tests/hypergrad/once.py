"""A function whose backward cannot be differentiated again."""

from __future__ import annotations

import torch


class Squared(torch.autograd.Function):
    """x², whose backward cannot be differentiated again."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient
