"""SiLU-gated products on a GPU in one kernel each way, for `mist.layers.activation_functions`.

    y = s(g) g u,    s(g) = 1 / (1 + exp(-g))
    dg = dy u s(g) (1 + g (1 - s(g))),    du = dy s(g) g

torch has no kernel for either: it runs two for y and four for dg and du, which move five and eleven
tensors of the size of y; these move three and five. Numbers are fp32 inside, rounded once. Needs
triton, which torch brings along for CUDA; TRITON_INTERPRET=1 runs them on a CPU.
"""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK: Final = 1024  # elements of a program: enough for wide loads, few enough for many programs


@triton.jit
def _product(gate: Any, up: Any, product: Any, size: Any, block: tl.constexpr) -> None:
    """One block of y; pointers to `size` elements."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < size
    g = tl.load(gate + at, mask=inside).to(tl.float32)
    u = tl.load(up + at, mask=inside).to(tl.float32)
    tl.store(product + at, g * u / (1 + tl.exp(-g)), mask=inside)


@triton.jit
def _gradients(
    grad: Any, gate: Any, up: Any, dgate: Any, dup: Any, size: Any, block: tl.constexpr
) -> None:
    """One block of dg and du; pointers to `size` elements."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < size
    dy = tl.load(grad + at, mask=inside).to(tl.float32)
    g = tl.load(gate + at, mask=inside).to(tl.float32)
    u = tl.load(up + at, mask=inside).to(tl.float32)
    s = 1 / (1 + tl.exp(-g))
    tl.store(dgate + at, dy * u * s * (1 + g * (1 - s)), mask=inside)
    tl.store(dup + at, dy * g * s, mask=inside)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, of contiguous tensors of one shape and type: bf16, fp16 or fp32."""
    product = torch.empty_like(gate)
    size = gate.numel()
    with torch.cuda.device_of(gate):  # triton launches on the current one
        _product[triton.cdiv(size, _BLOCK),](gate, up, product, size, block=_BLOCK)
    return product


def silu_product_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up; all contiguous, of one shape and type."""
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    size = gate.numel()
    with torch.cuda.device_of(gate):
        _gradients[triton.cdiv(size, _BLOCK),](grad, gate, up, dgate, dup, size, block=_BLOCK)
    return dgate, dup
