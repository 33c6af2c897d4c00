"""Dropout that keeps a mask of one byte or one bit an element, and booleans as bits.

On a CPU `F.dropout` keeps noise of the width of its input; CUDA's kernel keeps a byte. These keep
the same on both.
"""

from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mist.layers.recipes import offer, recipe_of

Masks = Literal["byte", "bit"]

BITS: Final = 8


def pack_bits(mask: Tensor) -> Tensor:
    """Booleans of any shape as uint8 [ceil(numel / 8)], the first in the lowest bit."""
    flat = mask.reshape(-1).to(torch.uint8)
    missing = -flat.shape[0] % BITS
    rows = torch.nn.functional.pad(flat, (0, missing)).view(-1, BITS)
    return (rows * _values(mask)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, like: Tensor) -> Tensor:
    """The booleans that were packed, in the shape of `like`."""
    rows = (packed[:, None] & _values(packed)) != 0
    return rows.reshape(-1)[: like.numel()].view(like.shape)


def _values(like: Tensor) -> Tensor:
    """Of the bits of a byte, lowest first."""
    return torch.tensor([1 << bit for bit in range(BITS)], dtype=torch.uint8, device=like.device)


def kept_mask(mask: Tensor, masks: Masks) -> Tensor:
    """A mask as it is kept: one byte an element, or one bit."""
    return pack_bits(mask) if masks == "bit" else mask


def plain_mask(kept: Tensor, like: Tensor) -> Tensor:
    """The mask of a tensor in whichever form it was kept."""
    return kept if kept.dtype == torch.bool else unpack_bits(kept, like)


class MaskedDropout(torch.autograd.Function):
    """Dropout of x by probability `p` < 1: keeps its mask only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, masks: Masks) -> tuple[Tensor, Tensor]:
        result, mask = torch.native_dropout(x, p, True)
        kept = kept_mask(mask, masks)
        ctx.save_for_backward(kept)
        ctx.mark_non_differentiable(kept)
        ctx.set_materialize_grads(False)
        ctx.scale = 1 / (1 - p)
        return result, kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return scaled(grad, kept, ctx.scale), None, None


def scaled(x: Tensor, kept: Tensor, scale: float) -> Tensor:
    """x * mask * scale, as the forward pass of dropout computes it."""
    result: Tensor = torch.ops.aten.native_dropout_backward(x, plain_mask(kept, x), scale)
    return result


def dropout(x: Tensor, p: float, masks: Masks) -> Tensor:
    """Dropout of a tensor of any shape; of a dropped one it can be computed again, too."""
    if p >= 1:  # all is zero, and 1 / (1 - p) no number
        return x * 0.0
    recipe = recipe_of(x)
    made: tuple[Tensor, Tensor] = MaskedDropout.apply(x, p, masks)  # type: ignore[no-untyped-call]
    result, kept = made
    if recipe is None:
        return result
    compute, scale = recipe.rebuild.compute, 1 / (1 - p)
    return offer(
        result, lambda mask, *rest: scaled(compute(*rest), mask, scale), kept, *recipe.sources
    )
