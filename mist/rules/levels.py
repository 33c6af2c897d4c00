"""Which memory levels layers may have: under a runtime, together, and with other settings."""

from collections.abc import Collection, Iterable, Iterator
from typing import Final

import numpy as np
from numpy.typing import ArrayLike

from mist.errors import Fault
from mist.plans.memory_levels import CONVERTS, PLAIN, levels_that
from mist.plans.plan import Layout
from mist.plans.schedules import DEFAULT_KIND, kinds_that
from mist.plans.workload import HeadMode, MemoryLevel
from mist.platform import Runtime
from mist.rules.rule import Columns, Mask, Rule, broken, keeps, layout_columns

SPLIT: Final = kinds_that(lambda row: row.splits_backward)
OFFLOADABLE: Final = levels_that(lambda row: row.may_offload)
SPLITTABLE: Final = levels_that(lambda row: row.may_split)

LEVEL_RULES: Final = (
    Rule(
        name="level-offloads",
        field="memory",
        holds=lambda c: np.isin(c["level"], OFFLOADABLE) | (c["activations"] == 0),
        message="what {level} layers keep stays on the device; offload no activations, or use "
        f"checkpoint {' or '.join(OFFLOADABLE)}",
    ),
    Rule(
        name="level-splits-backward",
        field="memory",
        holds=lambda c: np.isin(c["level"], SPLITTABLE) | ~np.isin(c["schedule"], SPLIT),
        message="{schedule} splits the backward pass: torch runs a selective layer backward once "
        "only, and a full one forward again for each of its weights; use checkpoint "
        f"{' or '.join(SPLITTABLE)}, or {DEFAULT_KIND}",
    ),
    Rule(
        name="level-divides",
        field="memory",
        # A wrapper of tensor parallelism loses how a dropped tensor is made again: it is kept.
        holds=lambda c: ~np.isin(c["level"], CONVERTS) | (c["tp"] == 1),
        message="tp {tp}: {level} layers keep all when tensor parallelism divides them; use tp 1, "
        f"or checkpoint {' or '.join(PLAIN)}",
    ),
)
"""What layers at a memory `level` may be combined with: `activations` offloaded, `schedule`, tp."""

_COLUMNS: Final = ("activations", "schedule", "tp")


def may_have(level: ArrayLike, columns: Columns) -> Mask:
    """Where stages may have layers at a level, or at several as a column of their own."""
    values = {name: columns[name] for name in _COLUMNS}
    return keeps(LEVEL_RULES, values | {"level": np.asarray(level, dtype=np.str_)})


def broken_by_levels(levels: Iterable[MemoryLevel], columns: Columns) -> Iterator[str]:
    """The messages of the level rules that one stage breaks."""
    values = {name: columns[name] for name in _COLUMNS}
    for level in dict.fromkeys(levels):
        yield from broken(LEVEL_RULES, values | {"level": level.value})


def broken_levels(runtime: Runtime, levels: Iterable[MemoryLevel]) -> Iterator[str]:
    """What a runtime has not of the memory levels that the layers of one stage have."""
    used = set(levels)
    words = [level for level in MemoryLevel if level in used]
    for level in words:
        if level not in runtime.levels:
            yield f"checkpoint {level}: runtime {runtime.name} has {', '.join(runtime.levels)}."
    if len(words) > 1 and not runtime.knobs.recomputes_some:
        yield (
            f"checkpoint {' and '.join(words)} in one stage: runtime {runtime.name} does the same "
            "with all layers of a stage."
        )
    elif not may_mix(runtime, used):
        partly = " and ".join(levels_that(lambda row: row.repeats == "part", used))
        yield f"runtime {runtime.name} makes all layers of a stage {partly}, or none."


def not_priced(level: MemoryLevel, model: str) -> str:
    """Why layers of a model have not a level that the runtime has: they cannot be converted."""
    return (
        f"checkpoint {level}: not all layers of {model} can be converted "
        f"(mist convert --level {level} says why); use checkpoint {' or '.join(PLAIN)}."
    )


def head_not_priced(mode: HeadMode, model: str) -> str:
    """Why a model has not a head that the runtime has."""
    return (
        f"head {mode}: the loss of {model} is no plain cross-entropy of what its last matrix "
        "gives; use head none."
    )


def level_faults(runtime: Runtime, layout: Layout) -> Iterator[Fault]:
    """What stages break by the memory levels of their layers."""
    for index, (stage, columns) in enumerate(
        zip(layout.stages, layout_columns(layout), strict=True)
    ):
        messages = [*broken_levels(runtime, stage.levels), *broken_by_levels(stage.levels, columns)]
        for message in messages:
            yield Fault(path=f"stages[{index}].memory", message=message)


def may_mix(runtime: Runtime, levels: Collection[MemoryLevel]) -> bool:
    """Whether layers of one stage may have these memory levels."""
    partly = levels_that(lambda row: row.repeats == "part", levels)
    return runtime.knobs.mixes_selective or not partly or len(set(levels)) == 1
