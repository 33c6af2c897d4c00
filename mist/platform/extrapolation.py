"""What of a plan is priced far outside the table that prices it: sentences for a reader.

A plan is priced again with costs that keep, for each end of each axis of a table, the size that
lies farthest beyond it. An end is reported when it matters: where doubling every time beyond it
makes a stage noticeably longer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import ArrayLike

from mist.platform.cluster import Collective
from mist.platform.op_sources import WHAT
from mist.platform.op_tables import AXES, Law, TabledOp
from mist.platform.op_times import F64, OpCosts
from mist.units import format_bytes

# How far outside a table its price is still taken as it is. Node tables cut short meet their last
# size within 4 % (median, at most 9 %) at a ratio of 2, 10 % (19 %) at 4, 19 % (67 %) at 8: beyond
# 4 the error reaches that of whole predictions (tests/platform/test_extrapolation.py).
FAR_RATIO: Final = 4.0
# Of a stage's time: a tenth of the least error that is claimed for a prediction.
NOTICEABLE_RATIO: Final = 0.01

BYTES: Final = "bytes"
Prices = Callable[[OpCosts], Mapping[str, F64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """An end of an axis of a table of `what`: its largest size, or its smallest."""

    what: str
    axis: str
    size: float
    is_largest: bool

    def ratio(self, sizes: F64) -> F64:
        """How many times beyond this end each size lies; below 1: it does not."""
        return sizes / self.size if self.is_largest else self.size / np.maximum(sizes, 1.0)

    def sentence(self, size: float) -> str:
        """The sentence about the size that lies farthest beyond."""
        end = "beyond the largest" if self.is_largest else "below the smallest"
        ratio = f"x{float(self.ratio(np.asarray(size))):.1f}"
        if self.axis == BYTES:
            size_words, edge_words = format_bytes(size), format_bytes(self.size)
        else:
            size_words, edge_words = f"{self.axis} {size:.0f}", f"{self.size:.0f}"
        return f"{self.what} of {size_words} are priced {end} measured size, {edge_words} ({ratio})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched(OpCosts):
    """Costs that note in `farthest` what is far beyond an edge; beyond `doubled`, they double."""

    farthest: dict[Edge, float] = field(default_factory=dict)
    doubled: Edge | None = None

    def op_s(self, op: TabledOp, law: Law, *arguments: ArrayLike) -> F64:
        """As `OpCosts.op_s`, watched."""
        seconds = OpCosts.op_s(self, op, law, *arguments)
        table = self.table(op)
        if table is None:
            return seconds
        sizes_by_axis = AXES[op].sizes([np.asarray(each, dtype=np.float64) for each in arguments])
        for name, sizes, known in zip(AXES[op].names, sizes_by_axis, table.axes, strict=True):
            seconds = self._watch((WHAT[op], name, known[0], known[-1]), sizes, seconds)
        return seconds

    def collective_s(
        self,
        collective: Collective,
        total_bytes: ArrayLike,
        group: ArrayLike,
        group_per_node: ArrayLike,
    ) -> F64:
        """As `OpCosts.collective_s`, watched where the node's table decides."""
        args = (collective, total_bytes, group, group_per_node)
        seconds = OpCosts.collective_s(self, *args)
        table = self.cluster.tables.get(collective)
        if table is None:
            return seconds
        # The table decides only where the part in the node is the slower one, and its group is in
        # the table.
        inside = np.minimum(group, group_per_node)
        in_node_s = OpCosts.collective_s(self, collective, total_bytes, inside, inside)
        by_table = (in_node_s >= seconds) & (inside > 1) & (inside <= table.groups[-1])
        low, high = table.rows[0][0], table.rows[-1][0]
        # The smallest size stands for what the table does not price: it is beyond no edge.
        sizes = np.where(by_table, total_bytes, low)
        what = f"{collective.replace('_', '-')}s"
        return self._watch((what, BYTES, low, high), sizes, seconds)

    def _watch(self, axis: tuple[str, str, float, float], sizes: F64, seconds: F64) -> F64:
        """Note the sizes far beyond either end of an axis: what, its name, smallest, largest."""
        what, name, low, high = axis
        for end, is_largest in ((low, False), (high, True)):
            edge = Edge(what=what, axis=name, size=end, is_largest=is_largest)
            # How far, over all arguments that are priced at once.
            ratio = edge.ratio(sizes)
            far = ratio > FAR_RATIO
            if far.any():
                size = float(sizes.flat[ratio.argmax()])
                pick = max if is_largest else min
                self.farthest[edge] = pick(self.farthest.get(edge, size), size)
            if edge == self.doubled:
                seconds = np.where(far, 2.0 * seconds, seconds)
        return seconds


def extrapolations(costs: OpCosts, priced: Prices) -> tuple[str, ...]:
    """Sentences on what a layout takes from far outside a table.

    Args:
        costs: what the layout's operations cost.
        priced: at given costs, `stable_s` and `lone_s` of each stage of the layout, in s.
    """
    watched = Watched(
        device=costs.device,
        cluster=costs.cluster,
        runtime=costs.runtime,
        numerics=costs.numerics,
    )
    before = priced(watched)
    return tuple(
        edge.sentence(size)
        # A list, as pricing again notes sizes in the same dictionary.
        for edge, size in list(watched.farthest.items())
        if _is_noticed(before, priced(replace(watched, doubled=edge)))
    )


def _is_noticed(before: Mapping[str, F64], after: Mapping[str, F64]) -> bool:
    slower = 1.0 + NOTICEABLE_RATIO
    return any((after[name] > slower * before[name]).any() for name in ("stable_s", "lone_s"))
