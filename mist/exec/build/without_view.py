"""Activations that may be changed in place, though autograd knows them as views.

What a distributed tensor gives of itself, or a reshaped activation, is a view for autograd, which
refuses changes in place to those that a Function of Python made.
"""

import torch


def without_view(x: torch.Tensor) -> torch.Tensor:
    """The same numbers (in the same memory) and gradients, no view."""
    return _Same.apply(x) if x._is_view() else x  # type: ignore[no-untyped-call]


class _Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        return grad
