"""What each memory level is: one row each, which rules, search, runtimes and tables loop over.

What a level costs is in `mist.symbolic.level_cost`; what training does at it, in
`mist.exec.build.activations`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from mist.plans.workload import MemoryLevel


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelRow:
    """What a memory level is.

    Args:
        repeats: what of a layer's forward pass the backward pass runs again.
        meaning: the field of a runtime that says what the level is there, null where the runtime
            has none; None: the level is the same everywhere.
        may_offload: whether activations of its layers may live in host memory.
        product_stride: layers run again but for the results of attention kernels and of every n-th
            matrix product, from the first on; 0: of no product; None: levels of another kind.
        may_split: whether its layers run backward in two parts (`ScheduleRow.splits_backward`).
        searched: whether spaces with every level hold it.
        converts: whether its layers are converted (`mist.layers`), so that its cost is that of the
            trace of the converted layer.
        word: what tables call layers at it, where that is not its name.
    """

    repeats: Literal["nothing", "part", "all"]
    meaning: str | None = None
    may_offload: bool = True
    product_stride: int | None = None
    may_split: bool = False
    searched: bool = True
    converts: bool = False
    word: str | None = None


LEVELS: Final = MappingProxyType(
    {
        MemoryLevel.NONE: LevelRow(repeats="nothing", may_split=True),
        # Beaten by the next two, which keep less and are exact: for comparison with the paper.
        MemoryLevel.TEMPO: LevelRow(
            repeats="part",
            meaning="converts_layers",
            may_offload=False,
            searched=False,
            converts=True,
        ),
        # The hooks of offload were not tried on tensors that several matrices make again.
        **dict.fromkeys(
            (MemoryLevel.DROP_ACTIVATION, MemoryLevel.DROP_NORM),
            LevelRow(repeats="part", meaning="converts_layers", may_offload=False, converts=True),
        ),
        # What these layers keep is kept by torch's checkpointing, which hooks of saved tensors do
        # not see.
        MemoryLevel.SELECTIVE: LevelRow(
            repeats="part",
            meaning="selective",
            product_stride=1,
            may_offload=False,
            word="selectively",
        ),
        # Of most layers some at drop-norm and some at sdpa-only keep as little and are faster
        # (docs/memory-levels.md, also where not): to search it would take longer.
        MemoryLevel.SAC_HALF: LevelRow(
            repeats="part",
            meaning="keeps_results",
            product_stride=2,
            may_offload=False,
            searched=False,
        ),
        MemoryLevel.SDPA_ONLY: LevelRow(
            repeats="part", meaning="keeps_results", product_stride=0, may_offload=False
        ),
        MemoryLevel.FULL: LevelRow(repeats="all"),
    }
)
"""What is known of each level, from the one that keeps most to the one that keeps least."""


def levels_that(
    has: Callable[[LevelRow], bool], among: Iterable[MemoryLevel] = MemoryLevel
) -> tuple[MemoryLevel, ...]:
    """The memory levels with a property."""
    return tuple(level for level in among if has(LEVELS[level]))


(KEEPS_ALL,) = levels_that(lambda row: row.repeats == "nothing")
(REPEATS_ALL,) = levels_that(lambda row: row.repeats == "all")
"""The two ends of the table."""

CONVERTS: Final = levels_that(lambda row: row.converts)
PLAIN: Final = levels_that(lambda row: not row.converts)
"""Levels whose layers are converted, and those that any model has as it is."""

(OWN_PART,) = levels_that(lambda row: row.meaning == "selective")
"""What each runtime calls selective: it says itself which part of a layer runs again."""

SEARCHED: Final = levels_that(lambda row: row.searched)
"""What a search that looks at every level looks at."""

USUAL: Final = (KEEPS_ALL, OWN_PART, REPEATS_ALL)
"""What other planners choose from."""


def memory_of(num_layers: int, level: MemoryLevel, num_repeated: int = 0) -> dict[MemoryLevel, int]:
    """Layers of a stage at each level: `num_repeated`, if it has as many, run again whole."""
    repeated = min(num_repeated, num_layers)
    return level_counts((level, num_layers - repeated), (REPEATS_ALL, repeated))


def level_counts(*parts: tuple[MemoryLevel, int]) -> dict[MemoryLevel, int]:
    """Layers at each level, as plans list them: the usual levels, and others where layers are."""
    counts = dict.fromkeys(MemoryLevel, 0)
    for level, number in parts:
        counts[level] += number
    return {level: number for level, number in counts.items() if number or level in USUAL}
