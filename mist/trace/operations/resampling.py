"""Operations on images that C++ computes with plain sizes only, so that any batch passes through.

`F.interpolate` asks for the output's size in C++, which makes a number of each symbolic size; its
gradients, `F.unfold` and `F.fold` do so in their kernels.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, cast

import torch
from torch._ops import OpOverloadPacket

aten = torch.ops.aten

# Of each function of interpolation: how many dimensions it resizes.
RESIZED: Final[Mapping[str, int]] = {
    "upsample_nearest1d": 1,
    "upsample_nearest2d": 2,
    "upsample_nearest3d": 3,
    "_upsample_nearest_exact1d": 1,
    "_upsample_nearest_exact2d": 2,
    "_upsample_nearest_exact3d": 3,
    "upsample_linear1d": 1,
    "upsample_bilinear2d": 2,
    "upsample_bicubic2d": 2,
    "upsample_trilinear3d": 3,
    "_upsample_bilinear2d_aa": 2,
    "_upsample_bicubic2d_aa": 2,
}


def _resized(
    name: str, x: torch.Tensor, output_size: Sequence[int] | None, *others: object
) -> torch.Tensor:
    """One function of interpolation, to a size or by factors (one is None).

    `others`: whether corners are aligned, of functions that ask, and the factors.
    """
    *corners, factors = others
    scales = cast(Sequence[float], factors or ())
    if output_size is None:
        sizes = zip(x.shape[-RESIZED[name] :], scales, strict=True)
        output_size = [torch.sym_int(size * factor) for size, factor in sizes]
    out = getattr(aten, name).default(x, output_size, *corners, *scales)
    return cast(torch.Tensor, out)


def _resized_gradient(
    grad: torch.Tensor, output_size: Sequence[int], input_size: Sequence[int], *_: object
) -> torch.Tensor:
    return grad.new_empty(input_size)


def _unfolded(
    x: torch.Tensor,
    kernel: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> torch.Tensor:
    """A column for each place of the kernel: [b, c k, places], from [b, c, height, width]."""
    places, values = 1, x.shape[-3]
    settings = zip(x.shape[-2:], kernel, dilation, padding, stride, strict=True)
    for size, width, step, pad, hop in settings:
        places *= (size + 2 * pad - step * (width - 1) - 1) // hop + 1
        values *= width
    return x.new_empty((*x.shape[:-3], values, places))


def _folded(
    columns: torch.Tensor, size: Sequence[int], kernel: Sequence[int], *_: object
) -> torch.Tensor:
    """The sum of the columns where they lie: [b, c, height, width], from [b, c k, places]."""
    channels = columns.shape[-2] // (kernel[0] * kernel[1])
    return columns.new_empty((*columns.shape[:-2], channels, *size))


INTERPOLATION: Final[Mapping[str, Callable[..., torch.Tensor]]] = {
    f"aten::{name}.vec": partial(_resized, name) for name in RESIZED
}
RESAMPLING: Final[Mapping[OpOverloadPacket, Callable[..., torch.Tensor]]] = {
    **{getattr(aten, f"{name}_backward"): _resized_gradient for name in RESIZED},
    aten.im2col: _unfolded,
    aten.col2im: _folded,
}
