"""Where the autograd graph of a part of a model begins and ends, cut off from the other parts."""

from collections.abc import Sequence

import torch
from torch.autograd.function import FunctionCtx

from mist.trace.dispatch_call import key_of
from mist.trace.expressions import Size


class SeedContext(FunctionCtx):
    """What backward needs to know of the outputs."""

    likes: list[tuple[tuple[Size, ...], torch.dtype]]


class Seed(torch.autograd.Function):
    """Starts a backward pass from outputs, without holding the gradients it hands out."""

    @staticmethod
    def forward(ctx: SeedContext, *outputs: torch.Tensor) -> torch.Tensor:
        """A scalar that depends on all outputs."""
        # Shapes only: a tensor that is held here would count as alive in the backward pass.
        ctx.likes = [(tuple(o.shape), o.dtype) for o in outputs]
        return outputs[0].new_empty(())

    @staticmethod
    def backward(ctx: SeedContext, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of all outputs, new."""
        return tuple(torch.empty(shape, dtype=dtype, device="cpu") for shape, dtype in ctx.likes)


def activation(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """What a layer works on: the first tensor with a gradient, else the first of floats."""
    floats = [t for t in tensors if t.is_floating_point()]
    return next((t for t in tensors if t.requires_grad), next(iter(floats or tensors), None))


def leaf(value: object) -> object:
    """A tensor that needs a gradient, cut off from what made it."""
    if isinstance(value, torch.Tensor) and value.requires_grad:
        return value.detach().requires_grad_()
    return value


def output(inputs: frozenset[int], value: object) -> object:
    """A result as what follows gets it: not the layer's own storage, unless it was passed on."""
    if isinstance(value, torch.Tensor) and key_of(value) not in inputs:
        return value.detach().clone().requires_grad_(value.requires_grad)
    return leaf(value)
