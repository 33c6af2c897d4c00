"""Attention written out, whose dropped-out probabilities are computed again (Tempo's third layer).

    P = softmax(scores),  D = P * mask / (1 - p),  out = D V
    dV = D^T g,  dP = (g V^T) * mask / (1 - p),  dscores = P * (dP - sum(dP * P))

Shapes: scores, P, mask, D [b, heads, s, s]; V and out [b, heads, s, d]. Kept: P, the mask and V; D
is P times the mask again. Attention kernels (flash) keep none of these and need none of this.
"""

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mist.layers.masks import Masks, kept_mask, scaled
from mist.layers.recipes import apply_function

IMPLEMENTATION: Final = "mist_dropout_"  # and the kind of masks; as transformers knows it


class SoftmaxDropoutProduct(torch.autograd.Function):
    """From scores and values to the output of attention; 0 <= p < 1."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, values: Tensor, p: float, masks: Masks) -> Tensor:
        probabilities = torch.softmax(scores, -1)
        kept, ctx.scale, dropped = None, 1 / (1 - p), probabilities
        if p > 0:
            dropped, mask = torch.native_dropout(probabilities, p, True)
            kept = kept_mask(mask, masks)
        ctx.save_for_backward(probabilities, kept, values)
        return dropped @ values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        probabilities, kept, values = ctx.saved_tensors
        again = probabilities if kept is None else scaled(probabilities, kept, ctx.scale)
        dvalues = again.transpose(-2, -1) @ grad
        del again
        inner = grad @ values.transpose(-2, -1)
        inner = inner if kept is None else scaled(inner, kept, ctx.scale)
        dscores = torch.ops.aten._softmax_backward_data(inner, probabilities, -1, inner.dtype)
        return dscores, dvalues, None, None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    p: float,
    causal: bool = False,
    masks: Masks = "byte",
) -> Tensor:
    """Attention of query, key, value [b, heads, s, d], with dropout by probability p.

    `mask`: booleans (True attends) or numbers that are added, to broadcast over the scores
    [b, heads, s, s]; where there is none, `causal` attends to what came before.
    """
    scores = (query @ key.transpose(-2, -1)) * scale
    if mask is None and causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        low = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, low) if mask.dtype == torch.bool else scores + mask
    return apply_function(SoftmaxDropoutProduct, scores, value, p, masks)


def _attention(masks: Masks) -> Any:
    def run(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **others: object,
    ) -> tuple[Tensor, None]:
        # Some kinds have fewer heads of keys and values: each is for a group of queries.
        groups = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
        out = attend(
            query,
            key,
            value,
            attention_mask,
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            p=dropout,
            causal=bool(getattr(module, "is_causal", False)) and query.shape[2] > 1,
            masks=masks,
        )
        return out.transpose(1, 2).contiguous(), None

    return run


def implementation(masks: Masks) -> str:
    """The name by which transformers knows this attention; registers it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    name = f"{IMPLEMENTATION}{masks}"
    AttentionInterface.register(name, _attention(masks))
    AttentionMaskInterface.register(name, eager_mask)
    return name
