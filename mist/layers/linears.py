"""Linear layers whose input is computed again in the backward pass.

    y = x W^T + bias,    dW = g^T x,    dx = g W        Conv1D (GPT-2): W stands the other way

Of the three only dW needs x [..., in], so a linear layer that is given a tensor with a recipe keeps
its sources instead (`mist.layers.recipes`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from mist.layers.recipes import Rebuild, apply_function, recipe_of


class LinearOfDropped(torch.autograd.Function):
    """Keeps W and the sources of x, whose gradient flows through x itself."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rebuild: Rebuild,
        flipped: bool,
        dtype: torch.dtype,
        *sources: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(weight, *sources)
        ctx.rebuild, ctx.flipped, ctx.dtypes = rebuild, flipped, (x.dtype, dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        rebuild.register()
        # Autocast of this call was decided outside: the weight is kept as it is, not cast.
        with torch.autocast(x.device.type, enabled=False):
            low_bias = None if bias is None else bias.to(dtype)
            matrix = weight.to(dtype)
            return F.linear(x.to(dtype), matrix.t() if flipped else matrix, low_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *sources = ctx.saved_tensors
        x_dtype, dtype = ctx.dtypes
        x = ctx.rebuild.again(*sources).to(dtype)
        x_rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        dweight = x_rows.t() @ grad_rows if ctx.flipped else grad_rows.t() @ x_rows
        del x, x_rows
        needs_x, _, needs_bias = ctx.needs_input_grad[:3]
        matrix = weight.to(dtype)
        dx = (grad @ (matrix.t() if ctx.flipped else matrix)).to(x_dtype) if needs_x else None
        dbias = grad_rows.sum(0).to(ctx.bias_dtype) if needs_bias else None
        nothing = (None,) * (3 + len(sources))
        return (dx, dweight.to(weight.dtype), dbias, *nothing)


def drops_input(x: Tensor, weight: Tensor) -> bool:
    """Whether a linear layer can let its input go: it has a recipe, and the weight is trained."""
    parts = isinstance(x, DTensor) or isinstance(weight, DTensor)
    trains = weight.requires_grad and torch.is_grad_enabled()
    return trains and not parts and recipe_of(x) is not None


def linear_of_dropped(x: Tensor, weight: Tensor, bias: Tensor | None, *, flipped: bool) -> Tensor:
    """x [..., in] times weight [out, in] (`flipped`: [in, out]), plus bias [out].

    x must have a recipe (`drops_input`).
    """
    recipe = recipe_of(x)
    assert recipe is not None, "the caller asks drops_input first"
    device = x.device.type
    mixed = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if mixed else x.dtype
    return apply_function(
        LinearOfDropped, x, weight, bias, recipe.rebuild, flipped, dtype, *recipe.sources
    )
