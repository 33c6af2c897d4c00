"""What the stages of one pipeline must have in common."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mist.model.summary import ModelFacts
from mist.plans.schedules import SCHEDULES
from mist.plans.workload import ScheduleKind
from mist.rules.rule import Columns


def divides_ends(columns: Columns) -> tuple[NDArray[np.int64], ...]:
    """What decides which part of a weight each rank of a stage has: dp, dp_replicate, tp, ZeRO-0.

    Where embedding and head are one matrix, gradients of the first and the last stage are summed
    rank by rank: both stages must have the same.
    """
    arrays = {name: np.asarray(columns[name]) for name in ("dp", "dp_replicate", "tp", "zero")}
    unsharded = (arrays["zero"] == 0).astype(np.int64)
    dp, copies, tp, _ = np.broadcast_arrays(*arrays.values())
    return dp, copies, tp, unsharded


def broken_between(
    facts: ModelFacts | None, schedule: ScheduleKind, stages: Sequence[Columns]
) -> Iterator[str]:
    """The messages of what the stages of one pipeline break together.

    `stages`: dp, dp_replicate, tp and zero of each, single values. `facts`: None where the model is
    not known yet.
    """
    grids = sorted({(int(str(own["dp"])), int(str(own["tp"]))) for own in stages})
    if SCHEDULES[schedule].takes_turns and len(grids) > 1:
        found = " and ".join(f"dp {dp} tp {tp}" for dp, tp in grids)
        others = " or ".join(sorted(kind for kind, row in SCHEDULES.items() if not row.takes_turns))
        yield (f"{schedule} needs the same dp and tp in every stage, found {found}; use {others}")
    if facts is not None and facts.tied and divides_ends(stages[0]) != divides_ends(stages[-1]):
        yield (
            f"{facts.name} ties its embedding to its head, so the first and the last stage must "
            "agree in dp, dp_replicate, tp, and in whether zero is 0"
        )
