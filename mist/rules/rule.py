"""A rule: what may be combined, as a predicate over columns, and what to say where it fails.

Columns are the knobs of a stage and of its pipeline by name (`mist.plans.knobs`), `schedule`,
`num_micro_batches`, and the offload ratios of each state; arrays over candidates in the search,
single values of a plan.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mist.errors import Fault
from mist.plans.plan import Layout

Columns = Mapping[str, ArrayLike]
Arrays = Mapping[str, NDArray[Any]]
Mask = NDArray[np.bool_]


class Scope(StrEnum):
    """Who keeps a rule: the search, the prediction of a given layout, or `mist apply`."""

    SEARCH = "search"
    PREDICT = "predict"
    APPLY = "apply"


EVERYWHERE: Final = frozenset(Scope)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule.

    Args:
        name: what it is called.
        holds: from columns to where the rule holds.
        message: what to say where it does not (format fields: the columns).
        field: what it is about: a field of a stage, or of the plan after "plan.".
        scope: who keeps it.
        runtimes: whose rule it is; empty: of every runtime.
    """

    name: str
    holds: Callable[[Arrays], ArrayLike]
    message: str
    field: str
    scope: frozenset[Scope] = EVERYWHERE
    runtimes: frozenset[str] = frozenset()

    def mask(self, columns: Columns) -> Mask:
        """True where the rule holds, in the broadcast shape of the columns."""
        return keeps((self,), columns)

    def path(self, stage: int) -> str:
        """Where in a plan its field stands."""
        whole = self.field.removeprefix("plan.")
        return whole if whole != self.field else f"stages[{stage}].{self.field}"


def keeps(rules: Iterable[Rule], columns: Columns) -> Mask:
    """True where all of the rules hold, in the broadcast shape of the columns."""
    arrays = {name: np.asarray(value) for name, value in columns.items()}
    mask = np.ones(np.broadcast_shapes(*(array.shape for array in arrays.values())), dtype=np.bool_)
    for rule in rules:
        mask &= np.asarray(rule.holds(arrays), dtype=np.bool_)
    return mask


def kept_by(rules: Iterable[Rule], scope: Scope, runtime: str) -> tuple[Rule, ...]:
    """The rules of a scope under a runtime."""
    return tuple(
        rule
        for rule in rules
        if scope in rule.scope and (not rule.runtimes or runtime in rule.runtimes)
    )


def broken(rules: Iterable[Rule], columns: Columns) -> Iterator[str]:
    """The messages of the rules that one layout (scalar columns) breaks."""
    for rule in rules:
        if not rule.mask(columns).all():
            yield rule.message.format(**columns)


def layout_columns(layout: Layout) -> list[dict[str, Any]]:
    """The columns of each stage of a layout, single values."""
    return [
        {
            **stage.columns,
            "num_stages": len(layout.stages),
            "num_micro_batches": layout.num_micro_batches,
            "schedule": layout.schedule.kind.value,
            "chunks": layout.schedule.vpp,
        }
        for stage in layout.stages
    ]


def stage_faults(rules: Sequence[Rule], stages: Sequence[Columns]) -> Iterator[Fault]:
    """What the stages of a pipeline break: each fault of the whole plan once."""
    faults = {
        Fault(path=rule.path(index), message=rule.message.format(**columns)): None
        for index, columns in enumerate(stages)
        for rule in rules
        if not rule.mask(columns).all()
    }
    yield from faults
