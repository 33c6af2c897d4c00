"""Activations and gated products that keep their input only, and Tempo's GELU from its output."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mist.layers.gelu_inverse import right_of_minimum, slope_from_output
from mist.layers.masks import Masks, kept_mask, plain_mask
from mist.layers.recipes import apply_function, offer

ActivationRung = Literal["fused", "drop", "output"]

QUICK: Final = 1.702  # of the sigmoid that stands for GELU: Hendrycks and Gimpel 2016, section 2
aten = torch.ops.aten


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """An elementwise function and its gradient: `back(grad, x)`.

    `invertible`: its output and one bit tell its slope (Tempo's GELU).
    """

    name: str
    run: Callable[[Tensor], Tensor]
    back: Callable[[Tensor, Tensor], Tensor]
    invertible: bool = False


def _relu_squared_back(grad: Tensor, x: Tensor) -> Tensor:
    return grad * 2 * F.relu(x)


def _quick_back(grad: Tensor, x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(QUICK * x)
    return grad * sigmoid * (1 + QUICK * x * (1 - sigmoid))


ACTIVATIONS: Final = {
    each.name: each
    for each in (
        Activation(name="gelu", run=F.gelu, back=aten.gelu_backward, invertible=True),
        Activation(
            name="gelu-tanh",
            run=lambda x: F.gelu(x, approximate="tanh"),
            back=lambda grad, x: aten.gelu_backward(grad, x, approximate="tanh"),
            invertible=True,
        ),
        Activation(name="silu", run=F.silu, back=aten.silu_backward),
        Activation(name="relu-squared", run=lambda x: F.relu(x).square(), back=_relu_squared_back),
        Activation(name="quick-gelu", run=lambda x: x * torch.sigmoid(QUICK * x), back=_quick_back),
        Activation(name="relu", run=F.relu, back=lambda grad, x: grad * (x > 0)),
    )
}


class ActivationFromInput(torch.autograd.Function):
    """Keeps x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.activation = name
        return ACTIVATIONS[name].run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ACTIVATIONS[ctx.activation].back(grad, x), None


class ActivationFromOutput(torch.autograd.Function):
    """Keeps the result and, by element, on which side of the minimum x was."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, masks: Masks) -> Tensor:
        result = ACTIVATIONS[name].run(x)
        ctx.save_for_backward(result, kept_mask(right_of_minimum(x, name), masks))
        ctx.activation = name
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        result, kept = ctx.saved_tensors
        slope = slope_from_output(result, plain_mask(kept, result), ctx.activation)
        return (grad * slope).to(grad.dtype), None, None


@cache
def _triton_kernels(device: torch.device) -> ModuleType | None:
    """`mist.layers.triton_kernels`; None where they do not run.

    Triton may be missing, or its C compiler, or the GPU may be older than those that it knows: one
    element tells.
    """
    one = torch.ones(1, device=device)
    try:
        kernels = import_module("mist.layers.triton_kernels")
        kernels.silu_product(one, one)
    except Exception:
        return None
    return kernels


def _kernels(name: str, *tensors: Tensor) -> ModuleType | None:
    """What computes a gated product of these tensors in one kernel, if anything does."""
    # A tensor of another class has no numbers (a dry run), or parts of them on other ranks.
    able = name == "silu" and all(
        type(each) is Tensor
        and each.is_cuda
        and each.is_contiguous()
        and each.dtype == tensors[0].dtype != torch.float64
        for each in tensors
    )
    return _triton_kernels(tensors[0].device) if able else None


def _gated_product(gate: Tensor, up: Tensor, name: str) -> Tensor:
    kernels = _kernels(name, gate, up)
    if kernels is None:
        return ACTIVATIONS[name].run(gate) * up
    product: Tensor = kernels.silu_product(gate, up)
    return product


class GatedProduct(torch.autograd.Function):
    """activation(gate) * up: keeps gate and up [..., f]."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = name
        return _gated_product(gate, up, name)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        gate, up = ctx.saved_tensors
        row, (needs_gate, needs_up, _) = ACTIVATIONS[ctx.activation], ctx.needs_input_grad
        kernels = _kernels(ctx.activation, grad, gate, up)
        if kernels is not None and needs_gate and needs_up:
            return (*kernels.silu_product_gradients(grad, gate, up), None)
        dgate = row.back(grad * up, gate) if needs_gate else None
        return dgate, grad * row.run(gate) if needs_up else None, None


def gains(name: str, rung: ActivationRung) -> bool:
    """Whether an activation that stands alone keeps less on a rung than as it is."""
    # relu keeps its result, which the next matrix keeps anyway; the others keep their input.
    return name != "relu" and (
        rung == "drop" or (rung == "output" and ACTIVATIONS[name].invertible)
    )


def activate(x: Tensor, name: str, rung: ActivationRung, masks: Masks = "byte") -> Tensor:
    """The activation `name` of x, of any shape."""
    if rung == "output" and ACTIVATIONS[name].invertible:
        return apply_function(ActivationFromOutput, x, name, masks)
    result = apply_function(ActivationFromInput, x, name)
    return offer(result, ACTIVATIONS[name].run, x) if rung == "drop" else result


def gated(gate: Tensor, up: Tensor, name: str, rung: ActivationRung) -> Tensor:
    """activation(gate) * up, of tensors of one shape."""
    result = apply_function(GatedProduct, gate, up, name)
    again = partial(_gated_product, name=name)
    return offer(result, again, gate, up) if rung == "drop" else result
