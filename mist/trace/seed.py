"""The start of a backward pass that holds no gradient of its own."""

import torch
from torch.autograd.function import FunctionCtx

from mist.trace.expr import Size


class SeedContext(FunctionCtx):
    """What backward needs to know of the outputs."""

    likes: list[tuple[tuple[Size, ...], torch.dtype]]


class Seed(torch.autograd.Function):
    """Starts a backward pass from outputs, without holding the gradients it hands out."""

    @staticmethod
    def forward(ctx: SeedContext, *outputs: torch.Tensor) -> torch.Tensor:
        """A scalar that depends on all outputs."""
        ctx.likes = [(tuple(o.shape), o.dtype) for o in outputs]
        return outputs[0].new_empty(())

    @staticmethod
    def backward(ctx: SeedContext, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of all outputs, new."""
        return tuple(torch.empty(shape, dtype=dtype, device="cpu") for shape, dtype in ctx.likes)
