"""Sliding windows of attention: masks that a flash kernel takes as two numbers.

Transformers builds a mask [b, 1, s, s] for layers that see a window of tokens only, with which
torch's attention runs over all pairs. A kernel with windows (FlashAttention 2, FlexAttention) skips
what lies outside and reads no mask. Within `windowed_masks` such a mask is a stand-in of one byte
that attention recognises by its storage.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import _disable_current_modes

from mist.trace.dispatch_call import key_of
from mist.trace.expressions import Size

MASKING: Final = "transformers.masking_utils"
ATTENTION: Final = "transformers.integrations.sdpa_attention"
MASKS_OF_SDPA: Final = "sdpa"

OnCall = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Window:
    """How many tokens before and after its own a token sees."""

    left: int
    right: int

    def pairs(self, seq: Size) -> Size:
        """Pairs of tokens that see each other, in a sequence that is longer than the window."""
        # The first tokens have fewer before them, the last ones fewer after them.
        cut = (self.left * (self.left + 1) + self.right * (self.right + 1)) // 2
        return seq * (self.left + self.right + 1) - cut


@dataclass(slots=True)
class Windows:
    """The stand-ins of one run, held so that no other storage gets the place of one."""

    _masks: dict[int, tuple[torch.Tensor, Window]] = field(default_factory=dict)

    def of(self, mask: torch.Tensor | None) -> Window | None:
        """The window that a mask stands for."""
        known = None if mask is None else self._masks.get(key_of(mask))
        return known[1] if known else None

    def mask(self, mask_of: OnCall, *args: object, **kwargs: Any) -> torch.Tensor | None:  # noqa: ANN401 (transformers' own signature)
        """In the place of transformers' function: a stand-in for what is a window and no more."""
        size, length = kwargs.get("local_size"), kwargs.get("kv_length")
        special = kwargs.get("use_vmap") or kwargs.get("attention_mask") is not None
        if args or size is None or length is None or special or length <= size:
            found: torch.Tensor | None = mask_of(*args, **kwargs)
            return found
        window = window_of(kwargs["mask_function"], size)
        if window is None:
            return mask_of(**kwargs)  # type: ignore[no-any-return]
        return self.stand_in(window, kwargs["batch_size"], kwargs["q_length"], length)

    def stand_in(self, window: Window, batch: Size, queries: Size, keys: Size) -> torch.Tensor:
        """A mask [b, 1, q, k] of one byte that is known as a window."""
        mask = torch.ones((), dtype=torch.bool)
        self._masks[key_of(mask)] = (mask, window)
        return mask.expand(batch, 1, queries, keys)

    def grouped(self, grouped_of: OnCall, mask: torch.Tensor | None, *args: object) -> bool:
        """In the place of transformers' question whether attention takes few key/value heads."""
        return bool(grouped_of(None if self.of(mask) else mask, *args))


def window_of(sees: OnCall, size: int) -> Window | None:
    """The window of a mask function, whose size is told, or None when it is another pattern."""
    row = 4 * size
    with _disable_current_modes():
        first, second = (_reach(sees, each, 8 * size + 2) for each in (row, row + 1))
    same = first is not None and second is not None and first[0] + 1 == second[0]
    if first is None or second is None or not same or first[1] + 1 != second[1]:
        return None
    return Window(row - first[0], first[1] - row)


def _reach(sees: OnCall, row: int, num_columns: int) -> tuple[int, int] | None:
    """The first and last token that a token sees; None when it sees not all between them."""
    zero = torch.zeros((), dtype=torch.int64)
    seen = sees(zero, zero, torch.tensor(row), torch.arange(num_columns)).nonzero().flatten()
    if not len(seen) or len(seen) != seen[-1] - seen[0] + 1:
        return None
    return int(seen[0]), int(seen[-1])


@contextmanager
def windowed_masks() -> Iterator[Windows]:
    """Within: transformers gives stand-ins for the masks of sliding windows."""
    windows = Windows()
    if MASKING not in sys.modules or ATTENTION not in sys.modules:
        yield windows
        return
    table = sys.modules[MASKING].ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    masks: Mapping[str, OnCall] = {MASKS_OF_SDPA: partial(windows.mask, table[MASKS_OF_SDPA])}
    asked = sys.modules[ATTENTION].use_gqa_in_sdpa
    with (
        patch.dict(table, masks),
        patch.object(sys.modules[ATTENTION], asked.__name__, partial(windows.grouped, asked)),
    ):
        yield windows
