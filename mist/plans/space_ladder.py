"""A ladder of search spaces, each holding the one before: what each part of a plan is worth.

Stages are alike in all but their position until "+imbalance"; 1F1B alone until "+schedules", which
is the whole default space.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from mist.plans.memory_levels import USUAL
from mist.plans.search_space import PAPER_RATIOS, SPACES, SearchSpace

_START: Final = SPACES["3d"]
_CHECKPOINTS: Final = replace(_START, some_layers=True)
_ZERO: Final = replace(_CHECKPOINTS, zero=(0, 1, 2, 3), dp_replicate=None)
_OFFLOAD: Final = replace(_ZERO, offload=PAPER_RATIOS)
_LEVELS: Final = replace(_OFFLOAD, levels=USUAL)

LADDER: Final[Mapping[str, SearchSpace]] = MappingProxyType(
    {
        "3d": _START,
        "+checkpointing": _CHECKPOINTS,
        "+ZeRO": _ZERO,
        "+offload": _OFFLOAD,
        "+levels": _LEVELS,
        "+imbalance": replace(_LEVELS, unlike_stages=True),
        "+schedules": SPACES["plain"],
    }
)
"""3d: dp, tp, pp, micro-batch, ZeRO-0 and 1, all layers recomputed or none."""
