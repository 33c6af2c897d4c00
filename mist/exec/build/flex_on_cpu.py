"""FlexAttention on a CPU, which torch has no kernel for that trains: torch's own dense reference.

It has a score for each pair of tokens. On other devices the model's own calls run.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from mist.trace.operations.flex_attention import flex_replaced
from mist.trace.operations.sized_calls import uncounted


def flex_on(device: torch.device, modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Within: flex_attention of these modules trains, on a CPU too.

    Around whole steps, in whose backward passes checkpoints run layers again.
    """
    if device.type != "cpu":
        return nullcontext()
    return flex_replaced(modules, {"flex_attention": _dense})


@uncounted()
def _dense(  # noqa: PLR0913, PLR0917 - the arguments of torch's flex_attention
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable[..., torch.Tensor] | None = None,
    block_mask: Any = None,  # noqa: ANN401 (torch's BlockMask)
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: object = None,
) -> object:
    """In the place of flex_attention of query [b, h, s, d], key and value [b, h or less, s, d]."""
    from torch._higher_order_ops.flex_attention import math_attention

    sees = _sees_all if block_mask is None else block_mask.mask_mod
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    out, log2_sums, _ = math_attention(
        query, key, value, score_mod or _as_it_is, (sees,), factor, {}
    )
    return (out, log2_sums * math.log(2)) if return_lse else out


def _sees_all(*indices: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(indices[-1], dtype=torch.bool)


def _as_it_is(score: torch.Tensor, *indices: torch.Tensor) -> torch.Tensor:
    return score
