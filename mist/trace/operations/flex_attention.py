"""FlexAttention as a flash kernel: its program is compiled on a GPU, its costs are those of one.

Which pairs of tokens see each other is a function of the model's. Where it is causal, or a window
that moves with the token, the kernel skips what lies outside; of any other pattern it skips what no
token before it sees, if that, and the rest is priced whole.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, Final
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from mist.trace.operations.model_functions import functions_of
from mist.trace.operations.sized_calls import uncounted
from mist.trace.operations.windows import Window, Windows

OnCall = Callable[..., Any]

FLEX: Final = "torch.nn.attention.flex_attention"
ROW: Final = 1 << 16  # a token so late that the windows in use lie within the tokens before it
NEIGHBOURS: Final = 2


@dataclass(frozen=True, slots=True)
class MaskFunction:
    """In the place of a block mask: its function alone, for blocks have as many as tokens have."""

    mask_mod: OnCall

    def to(self, *args: object, **kwargs: object) -> "MaskFunction":
        """Itself: it lies on no device."""
        return self


def flex_as_flash(modules: Iterable[nn.Module], windows: Windows) -> AbstractContextManager[None]:
    """Within: flex_attention of these modules runs as the other attention, on masks of no size."""
    attended = partial(_attended, windows)
    return flex_replaced(modules, {"flex_attention": attended, "create_block_mask": _mask})


@contextmanager
def flex_replaced(modules: Iterable[nn.Module], stand_ins: Mapping[str, OnCall]) -> Iterator[None]:
    """Within: these functions of torch's module of FlexAttention are others, by name.

    Also where the code of these modules has imported them.
    """
    flex = sys.modules.get(FLEX)
    if flex is None:  # torch takes long to import it, and no model has it
        yield
        return
    by_function = {getattr(flex, name): stand_in for name, stand_in in stand_ins.items()}
    with ExitStack() as stack:
        for function, stand_in in by_function.items():
            # What stands in for one already (in a dry run, a GPU's kernel) stays.
            if isinstance(function, FunctionType):
                stack.enter_context(patch.object(flex, function.__name__, stand_in))
        for table, name, function in functions_of(modules):
            if function in by_function:
                stack.enter_context(patch.dict(table, {name: by_function[function]}))
        yield


def _mask(mask_mod: OnCall, *args: object, **kwargs: object) -> MaskFunction:
    return MaskFunction(mask_mod)


@uncounted()
def _attended(
    windows: Windows,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: object,
    **kwargs: object,
) -> object:
    """In the place of torch's flex_attention: the result, with its statistics if asked for."""
    names = ("score_mod", "block_mask", "scale", "enable_gqa", "return_lse", "kernel_options")
    given: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
    is_causal, window = pattern_of(partial(_sees, given.get("score_mod"), given.get("block_mask")))
    num_keys, mask = key.shape[2], None
    if window is not None and num_keys > window.left + window.right + 1:
        mask = windows.stand_in(window, query.shape[0], query.shape[2], num_keys)
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=is_causal and mask is None,
        scale=given.get("scale"),
        enable_gqa=bool(given.get("enable_gqa")),
    )
    if given.get("return_lse"):
        return out, query.new_empty(query.shape[:3], dtype=torch.float32)
    return out


def _sees(
    score_mod: OnCall | None,
    block_mask: Any,  # noqa: ANN401 (torch's, or ours)
    *indices: torch.Tensor,
) -> torch.Tensor:
    """Whether a query sees a key, of the indices of sample, head, query and key."""
    shown = torch.ones_like(indices[-1], dtype=torch.bool)
    if block_mask is not None:
        shown = shown & block_mask.mask_mod(*indices)
    if score_mod is not None:
        shown = shown & (score_mod(torch.zeros(indices[-1].shape), *indices) > -torch.inf)
    return shown


def pattern_of(sees: OnCall) -> tuple[bool, Window | None]:
    """Whether no token sees a later one, and the window that moves with it, if there is one.

    From the keys that two neighbours see. A function that reads the model's tensors has no pattern.
    """
    try:
        with _disable_current_modes():
            zero, keys = torch.zeros((), dtype=torch.int64), torch.arange(2 * ROW)
            seen = [
                sees(zero, zero, torch.tensor(row), keys).nonzero().flatten().tolist()
                for row in range(ROW, ROW + NEIGHBOURS)
            ]
    except Exception:  # whatever the model's function raises of numbers
        return False, None
    if not all(seen):
        return False, None
    is_causal = all(each[-1] <= ROW + i for i, each in enumerate(seen))
    ends = [(each[0] - ROW - i, each[-1] - ROW - i) for i, each in enumerate(seen)]
    whole = all(len(each) == each[-1] - each[0] + 1 for each in seen)
    if whole and ends[0] == ends[1]:
        return is_causal, Window(-ends[0][0], ends[0][1])
    return is_causal, None
