"""What the traced model runs on: a GPU's kernels imitated on fake CPU tensors, or this CPU.

Fake CPU tensors follow the CPU's rules: attention, dropout and norms save other tensors than on a
GPU. Policy "cuda" sends the three composite functions to the operations that a GPU build chooses,
and gives norm statistics the dtype that CUDA kernels write. Policy "cpu" changes nothing.
"""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mist.spec import Attention
from mist.trace.autocast import HALF, in_fp32, narrowed
from mist.trace.fake import DTYPES
from mist.trace.kernels import SYMBOLIC, fused_rms_norm
from mist.trace.source import Policy, Setting

aten = torch.ops.aten
OnCall = Callable[..., object]
WRITTEN_NORMS: Final = ("RMSNorm", "T5LayerNorm")
# The widest head that CUDA's flash kernel takes (torch sdp_utils.cpp, check_head_dim_size_flash).
MAX_FLASH_HEAD_DIM: Final = 256
# It takes multiples of 8 only; other heads are padded before it and cut after it.
FLASH_GRAIN: Final = 8
STATISTICS_IN_FP32: Final = frozenset({aten.native_layer_norm, aten.native_batch_norm})


class Functions(TorchFunctionMode):
    """Calls of some torch functions go to a replacement, however the model imported them."""

    def __init__(self, replacements: Mapping[object, Callable[..., object]]) -> None:
        super().__init__()
        self._replacements = replacements

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        return self._replacements.get(func, func)(*args, **(kwargs or {}))


class Kernels(TorchDispatchMode):
    """Single operations: norm statistics as CUDA writes them; symbolic sizes where C++ has none."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._policy = policy

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        kernel: Callable[..., Any] = SYMBOLIC.get(func.overloadpacket, func)
        out = kernel(*args, **(kwargs or {}))
        if self._policy == "cuda" and func.overloadpacket in STATISTICS_IN_FP32:
            first, *statistics = out
            return first, *(each.float() for each in statistics)
        return out


def _fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The first kernel of torch's list (flash, memory-efficient, math) that takes the inputs."""
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    flash = attn_mask is None and query.dtype in HALF and head_dim == value_dim
    if flash and head_dim <= MAX_FLASH_HEAD_DIM:
        return _flash(query, key, value, dropout_p, is_causal, scale)
    if enable_gqa:
        return _math(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    bias = None if attn_mask is None else _bias(attn_mask, query, key)
    return _first(
        aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, dropout_p, is_causal, scale=scale
        )
    )


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    head_dim = query.shape[-1]
    missing = -head_dim % FLASH_GRAIN
    if missing:
        query, key, value = (F.pad(each, (0, missing)) for each in (query, key, value))
        scale = head_dim**-0.5 if scale is None else scale
    out = _first(
        aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )
    )
    return out[..., :head_dim] if missing else out


def _bias(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A mask as the additive bias that the memory-efficient kernel takes."""
    if mask.dtype is torch.bool:
        zeros = torch.zeros_like(mask, dtype=query.dtype)
        mask = zeros.masked_fill_(mask.logical_not(), float("-inf"))
    return mask.expand(*query.shape[:3], key.shape[2])


def _math(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
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


def _dropout(
    input: torch.Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> torch.Tensor:
    if not training or p == 0.0:
        return input
    return torch.native_dropout(input, p, True)[0]


def _rms_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    return _first(fused_rms_norm(input, weight, len(normalized_shape)))


# Under fake tensors transformers cannot look at position_ids and builds a [b, 1, s, s] mask for
# packed sequences, which a real run does not have.
MASKING: Final = "transformers.masking_utils"
PACKED_CHECK: Final = "find_packed_sequence_indices"


@contextmanager
def runs_as(setting: Setting) -> Iterator[None]:
    """Within: functions and kernels behave as on the setting's device."""
    replacements = _replacements(setting)
    with ExitStack() as stack:
        stack.enter_context(patch.object(logging.getLogger("transformers"), "disabled", True))
        if MASKING in sys.modules:
            stack.enter_context(patch.object(sys.modules[MASKING], PACKED_CHECK, _not_packed))
        stack.enter_context(Kernels(setting.policy))
        wide = in_fp32() if setting.autocast and setting.policy == "cuda" else {}
        originals = {getattr(F, name): new for name, new in replacements.items()}
        stack.enter_context(Functions({**wide, **originals}))
        # A mode does not see what F.multi_head_attention_forward calls inside; a patch does.
        for name, new in replacements.items():
            stack.enter_context(patch.object(F, name, new))
        yield


def _replacements(setting: Setting) -> dict[str, Callable[..., object]]:
    found: dict[str, Callable[..., object]] = {}
    attend = _math if setting.attention is Attention.MATH else _fused
    if setting.autocast:
        attend = narrowed(attend, DTYPES[setting.precision])
    if setting.policy == "cuda":
        found |= {"dropout": _dropout, "rms_norm": _rms_norm}
    if setting.policy == "cuda" or setting.attention is Attention.MATH:
        found |= {"scaled_dot_product_attention": attend}
    return found


def fused_norms(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, OnCall]]:
    """The RMS norms that are written out in several operations, and a kernel to stand in."""
    for module in modules:
        name, weight = type(module).__name__, getattr(module, "weight", None)
        written = name.endswith(WRITTEN_NORMS) and not isinstance(module, nn.RMSNorm)
        if written and isinstance(weight, torch.Tensor) and weight.dim() == 1:
            yield module, partial(_fused_norm, module)


def _fused_norm(
    norm: nn.Module, forward: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor:
    (x,) = (*args, *kwargs.values())
    return _first(fused_rms_norm(x, norm.weight, 1))


def _not_packed(position_ids: torch.Tensor) -> None:
    return None
