"""LayerNorm and RMSNorm in one step: from the input, to be computed again, or from the output.

    xhat = (x - mean) * rstd,  y = scale * xhat + bias          mean and bias: LayerNorm only
    dx = rstd * (gs - mean(gs) - xhat * mean(gs * xhat))        gs = grad * scale
    dscale = sum(grad * xhat),  dbias = sum(grad)

Rows: all dimensions but the last. A `NormForm` says which of the norms in use it is; they differ in
what is rounded when. From the output (Tempo's way: Andoorveedu et al. 2022, arXiv 2210.10246),
xhat = (y - bias) / scale, so the input is not kept; where that loses digits, xhat is kept, by
column.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from mist.layers.norm_kernels import norm_gradients, rms_norm, rms_norm_gradients, wide
from mist.layers.recipes import apply_function, offer

NormRung = Literal["fused", "drop", "output"]
RUNG_WORDS: Final = {"fused": "in one step", "drop": "made again", "output": "from its result"}

# Of |bias| over |scale|: xhat from y has the rounding error of y times 1 + this ratio.
MAX_BIAS_RATIO: Final = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NormForm:
    """Which norm: `centered` is LayerNorm. The scale is `offset` + weight.

    `rounds_first`: xhat is rounded to the type of x before it is scaled (Llama), else after.
    """

    centered: bool
    offset: float
    rounds_first: bool

    def scale(self, weight: Tensor | None) -> Tensor | None:
        """What xhat is multiplied by, [h]."""
        return weight if weight is None or self.offset == 0 else self.offset + wide(weight)


LAYER_NORM: Final = NormForm(centered=True, offset=0, rounds_first=False)
RMS_NORM: Final = NormForm(centered=False, offset=0, rounds_first=False)
LLAMA_NORM: Final = NormForm(centered=False, offset=0, rounds_first=True)
GEMMA_NORM: Final = NormForm(centered=False, offset=1, rounds_first=False)
NORM_FORMS: Final = {
    "LayerNorm": LAYER_NORM,
    "RMSNorm": RMS_NORM,
    "RMSNorm that rounds before it scales": LLAMA_NORM,
    "RMSNorm scaled by 1 + weight": GEMMA_NORM,
}


def default_epsilon(x: Tensor) -> float:
    """What `nn.RMSNorm` takes where it is given none: the step of fp32, or fp64."""
    return torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, form: NormForm
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, the means and 1 / deviation of rows: [..., h], [..., 1], [..., 1]."""
    if form.centered:
        return torch.native_layer_norm(x, (x.shape[-1],), weight, bias, eps)
    scale = form.scale(weight)
    result, rstd = rms_norm(x, None if form.rounds_first else scale, eps)
    if form.rounds_first and scale is not None:
        result = scale * result
    return result, rstd, rstd


def _note(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, form: NormForm) -> None:
    ctx.form, ctx.dtype = form, x.dtype
    ctx.weight_dtype = None if weight is None else weight.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


class NormFromInput(torch.autograd.Function):
    """Keeps x [..., h] and one or two fp32 numbers a row."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        form: NormForm,
    ) -> Tensor:
        result, mean, rstd = normalize(x, weight, bias, eps, form)
        _note(ctx, x, weight, bias, form)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if ctx.form.centered:
            # torch's own kernel: the gradient of the plain layer, digit for digit.
            grads = torch.ops.aten.native_layer_norm_backward(
                grad, x, (x.shape[-1],), mean, rstd, weight, bias, ctx.needs_input_grad[:3]
            )
            return (*grads, None, None)
        dx, dscale = rms_norm_gradients(
            grad, x, rstd, ctx.form.scale(weight), ctx.needs_input_grad[:2]
        )
        return dx, None if dscale is None else dscale.to(ctx.weight_dtype), None, None, None


class NormFromOutput(torch.autograd.Function):
    """Keeps the result y [..., h] (which a linear layer keeps anyway) and an fp32 number a row."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        form: NormForm,
    ) -> Tensor:
        result, mean, rstd = normalize(x, weight, bias, eps, form)
        columns = _lossy(form.scale(weight), bias, result.dtype)
        kept = None
        if columns is not None:
            part = wide(x)[..., columns]
            kept = ((part - mean if form.centered else part) * rstd).to(x.dtype)
        _note(ctx, x, weight, bias, form)
        ctx.save_for_backward(result, weight, bias, rstd, columns, kept)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        result, weight, bias, rstd, columns, kept = ctx.saved_tensors
        scale = ctx.form.scale(weight)
        xhat = wide(result) if bias is None else wide(result) - wide(bias)
        xhat = xhat if scale is None else xhat / wide(scale)
        if columns is not None:
            xhat = xhat.index_copy(-1, columns, kept.to(xhat.dtype))
        dx, dscale, dbias = norm_gradients(
            grad, xhat, rstd, scale, ctx.needs_input_grad[:3], centered=ctx.form.centered
        )
        dweight = None if dscale is None else dscale.to(ctx.weight_dtype)
        dbias = None if dbias is None else dbias.to(ctx.bias_dtype)
        return None if dx is None else dx.to(ctx.dtype), dweight, dbias, None, None


def _lossy(scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The columns whose xhat the result does not tell: a scale of 0, or small against the bias.

    None where there are none. On a GPU this waits for the device.
    """
    # A trace has no numbers; it counts the bytes of a scale that is not small.
    if scale is None or isinstance(scale, FakeTensor) or scale.is_meta:
        return None
    size = wide(scale).abs()
    lossy = size < torch.finfo(dtype).smallest_normal
    if bias is not None:
        lossy = lossy | (wide(bias).abs() > MAX_BIAS_RATIO * size)
    columns = lossy.nonzero()[:, 0]
    return columns if len(columns) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class NormOp:
    """A norm with its numbers; `eps` None: the step of the type it computes in, as `nn.RMSNorm`."""

    form: NormForm
    eps: float | None
    rung: NormRung

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The norm of x [..., h] with weight and bias [h]."""
        # Autocast runs the norms of torch in fp32 on a GPU; those written out decide themselves.
        if x.is_cuda and not self.form.rounds_first and torch.is_autocast_enabled("cuda"):
            x = x.float()
        eps = default_epsilon(x) if self.eps is None else self.eps
        if self.rung == "output":
            return apply_function(NormFromOutput, x, weight, bias, eps, self.form)
        result: Tensor = apply_function(NormFromInput, x, weight, bias, eps, self.form)
        if self.rung == "fused":
            return result
        present = [each for each in (weight, bias) if each is not None]

        def compute(x: Tensor, *parameters: Tensor) -> Tensor:
            weight = parameters[0] if parameters else None
            bias = parameters[1] if len(parameters) > 1 else None
            return normalize(x, weight, bias, eps, self.form)[0]

        return offer(result, compute, x, *present)
