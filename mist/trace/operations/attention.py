"""Scaled dot-product attention as torch dispatches it on a GPU: flash, memory-efficient or math.

The first kernel whose conditions hold is taken, as in torch 2.13
(ATen/native/transformers/cuda/sdp_utils.cpp and sdp_utils_cpp.h) on compute capability 8.0 and
higher. cuDNN's kernel, which some builds prefer, saves what flash saves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
import torch.nn.functional as F

from mist.trace.operations.autocast import HALF
from mist.trace.operations.windows import Window, Windows

aten = torch.ops.aten

MAX_FLASH_HEAD_DIM: Final = 256
# The flash kernel takes multiples of 8 only; other heads are padded before it and cut after it.
FLASH_GRAIN: Final = 8
DIMS: Final = 4  # [batch, heads, tokens, head size]
ALIGNMENT_BITS: Final = 128  # of a head, for the memory-efficient kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class Attend:
    """One call: query [b, h, q, d], key and value [b, h_kv, k, d and d_v], and how to attend."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool

    @property
    def flash(self) -> bool:
        """Whether the flash kernel takes it."""
        one_size = self.query.shape[-1] == self.key.shape[-1] == self.value.shape[-1]
        square = not self.is_causal or self.query.shape[2] == self.key.shape[2]
        dtype = self.query.dtype in HALF and self._same_dtype
        free = self.attn_mask is None and self._fits(grouped=self.enable_gqa)
        return free and dtype and one_size and square and self.query.shape[-1] <= MAX_FLASH_HEAD_DIM

    @property
    def efficient(self) -> bool:
        """Whether the memory-efficient kernel takes it."""
        grain = ALIGNMENT_BITS // (8 * self.query.element_size())
        sizes = (self.query.shape[-1], self.value.shape[-1])
        aligned = all(size % grain == 0 for size in sizes)
        one_size = self.query.shape[-1] == self.key.shape[-1]
        return self._fits(grouped=False) and self._same_dtype and aligned and one_size

    @property
    def _same_dtype(self) -> bool:
        return self.query.dtype == self.key.dtype == self.value.dtype

    def _fits(self, *, grouped: bool) -> bool:
        """What all fused kernels ask: four dimensions, one batch, and heads that match."""
        inputs = (self.query, self.key, self.value)
        if any(each.dim() != DIMS for each in inputs) or self._strided(inputs):
            return False
        if not self.query.shape[0] == self.key.shape[0] == self.value.shape[0]:
            return False
        heads, key_heads, value_heads = (each.shape[1] for each in inputs)
        if key_heads != value_heads:
            return False
        return heads == key_heads or (grouped and heads % key_heads == 0)

    @staticmethod
    def _strided(inputs: Sequence[torch.Tensor]) -> bool:
        return any(each.stride(-1) != 1 for each in inputs)


def fused(
    windows: Windows,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """F.scaled_dot_product_attention by the first kernel that takes the inputs.

    A mask that `windows` knows is none for the flash kernel, but two numbers.
    """
    window = windows.of(attn_mask)
    call = Attend(
        query=query,
        key=key,
        value=value,
        attn_mask=None if window else attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    if call.flash:
        return _flash(call, window)
    call = replace(call, attn_mask=attn_mask)
    if call.efficient:
        return _efficient(call)
    return math(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _flash(call: Attend, window: Window | None) -> torch.Tensor:
    query, key, value, scale = call.query, call.key, call.value, call.scale
    head_dim = query.shape[-1]
    missing = -head_dim % FLASH_GRAIN
    if missing:
        query, key, value = (F.pad(each, (0, missing)) for each in (query, key, value))
        # Padding must not change the scale, which is of the unpadded size.
        scale = head_dim**-0.5 if scale is None else scale
    if window is not None:
        out = _in_window(replace(call, query=query, key=key, value=value, scale=scale), window)
        return out[..., :head_dim] if missing else out
    out = _first(
        aten._scaled_dot_product_flash_attention(
            query, key, value, call.dropout_p, call.is_causal, scale=scale
        )
    )
    return out[..., :head_dim] if missing else out


def _in_window(call: Attend, window: Window) -> torch.Tensor:
    """The kernel below torch's function, which has the window; its dimensions are [b, s, h, d]."""
    query, key, value = (each.transpose(1, 2) for each in (call.query, call.key, call.value))
    out = aten._flash_attention_forward(
        query,
        key,
        value,
        None,
        None,
        query.shape[1],
        key.shape[1],
        call.dropout_p,
        False,
        False,
        scale=call.scale,
        window_size_left=window.left,
        window_size_right=window.right,
    )
    return _first(out).transpose(1, 2)


def _efficient(call: Attend) -> torch.Tensor:
    bias = None if call.attn_mask is None else _bias(call.attn_mask, call.query, call.key)
    return _first(
        aten._scaled_dot_product_efficient_attention(
            call.query,
            call.key,
            call.value,
            bias,
            True,
            call.dropout_p,
            call.is_causal,
            scale=call.scale,
        )
    )


def _bias(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A mask as the additive bias that the memory-efficient kernel takes."""
    if mask.dtype is torch.bool:
        zeros = torch.zeros_like(mask, dtype=query.dtype)
        mask = zeros.masked_fill_(mask.logical_not(), float("-inf"))
    return mask.expand(*query.shape[:3], key.shape[2])


def math(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """F.scaled_dot_product_attention by products and a softmax that is kept."""
    return _first(
        aten._scaled_dot_product_attention_math(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    )


def _first(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return outputs[0]
