"""What lives of every parameter through a training step: one table of items.

Weights, master copy, gradients and moments are rows: their bytes, and the ZeRO level from which
ranks divide them. What a rank holds, what may leave the device, and what is left of a parameter
that is not trained are sums over these rows.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from typing import Annotated, ClassVar, Final, Literal

from pydantic import BeforeValidator

from mist.plans.workload import Optimizer, Precision
from mist.platform.quantity import Quantity, Record

ZeroLevel = Literal[0, 1, 2, 3]
ZERO_LEVELS: Final[tuple[ZeroLevel, ...]] = (0, 1, 2, 3)


class StateItem(StrEnum):
    """What lives of a parameter.

    WEIGHTS: in compute precision, as the passes read them; not where they are gathered for a layer
    at a time. MASTER: what the optimizer updates, where that is another copy. GRADIENTS: as they
    are summed over micro-batches. MOMENTS: what the optimizer remembers.
    """

    WEIGHTS = "weights"
    MASTER = "master"
    GRADIENTS = "gradients"
    MOMENTS = "moments"


@dataclass(frozen=True, slots=True, kw_only=True)
class StateRow(Record):
    """Bytes per parameter of one item, for some precisions, ZeRO levels and optimizers.

    Data-parallel ranks divide them from ZeRO level `sharded_from` on (null: never). `optimizers`:
    null where all of them have it. `frozen_bytes_per_param`: of a parameter that is not trained,
    where that is more than its weights.
    """

    not_zero: ClassVar = ("bytes_per_param",)

    bytes_per_param: Quantity
    sharded_from: ZeroLevel | None
    precisions: tuple[Precision, ...] = tuple(Precision)
    zero_levels: tuple[ZeroLevel, ...] = ZERO_LEVELS
    optimizers: tuple[Optimizer, ...] | None = None
    frozen_bytes_per_param: Quantity | None = None

    def is_of(self, precision: Precision, optimizer: Optimizer) -> bool:
        """Whether the row is of this precision and optimizer."""
        has_optimizer = self.optimizers is None or optimizer in self.optimizers
        return precision in self.precisions and has_optimizer

    def is_sharded(self, zero: int) -> bool:
        """Whether ranks divide it at a ZeRO level."""
        return self.sharded_from is not None and zero >= self.sharded_from

    def frozen_bytes(self, item: StateItem) -> float:
        """Bytes per parameter that is not trained: only its weights, unless the row says more."""
        if self.frozen_bytes_per_param is not None:
            return self.frozen_bytes_per_param.value
        return self.bytes_per_param.value if item is StateItem.WEIGHTS else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSum:
    """Bytes per parameter: `replicated` on every rank, `sharded` over those that share them."""

    replicated: float
    sharded: float

    def bytes_per_param(self, dp: int) -> float:
        """Bytes per parameter on a rank of `dp` data-parallel ranks."""
        return self.replicated + self.sharded / dp


def _refuse_sums(states: object) -> object:
    """Raise ValueError for a profile written before states had items."""
    if isinstance(states, list):
        raise ValueError(
            "is a list of sums, as profiles had before. Write rows by item instead (weights, "
            "master, gradients, moments), as `states` of profiles/runtimes/torch.yaml: each with "
            "bytes_per_param and sharded_from. frozen_shard_bytes_per_param is now "
            "frozen_bytes_per_param of a row, and offload names items"
        )
    return states


States = Annotated[Mapping[StateItem, tuple[StateRow, ...]], BeforeValidator(_refuse_sums)]


def sum_states(
    states: States, zero: int, items: Iterable[StateItem] = StateItem, *, frozen: bool = False
) -> StateSum:
    """Bytes of some items of a parameter at a ZeRO level; `frozen`: of one that is not trained.

    `states`: of one precision and optimizer (`Runtime.states_of`).
    """
    totals = {False: 0.0, True: 0.0}
    for item in items:
        for row in states.get(item, ()):
            if zero in row.zero_levels:
                num_bytes = row.frozen_bytes(item) if frozen else row.bytes_per_param.value
                totals[row.is_sharded(zero)] += num_bytes
    return StateSum(replicated=totals[False], sharded=totals[True])


def states_of(states: States, precision: Precision, optimizer: Optimizer) -> States:
    """The rows of one precision and optimizer."""
    return {
        item: tuple(row for row in rows if row.is_of(precision, optimizer))
        for item, rows in states.items()
    }


def optimizers_of(states: States) -> tuple[Optimizer, ...]:
    """The optimizers whose moments are known."""
    moments = states.get(StateItem.MOMENTS, ())
    return tuple(
        each for each in Optimizer if any(each in (row.optimizers or ()) for row in moments)
    )


def check_states(states: States, zero_levels: Iterable[ZeroLevel]) -> None:
    """Raise ValueError for an item that a precision lacks at a ZeRO level, or has twice."""
    moments = states.get(StateItem.MOMENTS, ())
    if not moments or not all(row.optimizers for row in moments):
        raise ValueError("states.moments must have rows, and each name its optimizers")
    # A missing row would fail in the middle of a search; here the file is known.
    for precision, optimizer in product(Precision, optimizers_of(states)):
        _check_rows(
            states_of(states, precision, optimizer),
            zero_levels,
            f"{precision.value} and {optimizer.value}",
        )


def _check_rows(states: States, zero_levels: Iterable[ZeroLevel], of: str) -> None:
    """The same for the rows of one precision and optimizer."""
    for zero in zero_levels:
        count = {
            item: sum(zero in row.zero_levels for row in states.get(item, ())) for item in StateItem
        }
        place = f"{of} at ZeRO-{zero}"
        if twice := [item.value for item, number in count.items() if number > 1]:
            raise ValueError(f"states.{twice[0]} has two rows for {place}")
        count[StateItem.WEIGHTS] += count.pop(StateItem.MASTER)  # either is the parameters
        if absent := [item.value for item, number in count.items() if not number]:
            raise ValueError(f"states.{absent[0]} lacks a row for {place}")
