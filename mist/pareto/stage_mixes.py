"""The mixes of two memory levels that a stage may have at a position, and what each costs.

A stage of l layers has them at one memory level, or the first l - c at one and the last c at a
deeper one. Per strategy, layer range and pair of levels, both times are straight lines in c, and
memory falls with c (beyond the first layer, which adds the working set of a recomputation). So

    both times rise with c     the least c that fits                          (found by bisection)
    both fall                  all layers at the deeper level, which is a mix of its own
    one rises, one falls       every c from the least that fits on

and nothing else can be on a frontier. Where stages share host memory, bytes there count like a
time: offloaded activations fall with c, and every c may be needed. Where unlike layers follow each
other the peak may rise again as recomputation reaches another kind: the least c is looked for
between such numbers one by one. What fits is always checked, never inferred.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mist.pareto.layer_ranges import Ranges, kinds_of
from mist.pareto.level_choice import LevelRows
from mist.pareto.linear_cost import Held, StageLines, instants
from mist.pareto.strategies import Floats, Ints
from mist.plans.plan import Limits
from mist.plans.workload import MemoryLevel
from mist.symbolic.job import Job


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mixes:
    """Stages with layers at `upper` and the first `num_lower` at `lower`: arrays [K, R].

    `row`: the strategy of each k. Times in s. `fits`: within the limits, and `num_lower` possible.
    """

    upper: MemoryLevel
    lower: MemoryLevel
    row: Ints
    num_lower: Ints
    stable_s: Floats
    lone_s: Floats
    peak_bytes: Floats
    host_bytes: Floats
    fits: NDArray[np.bool_]

    def part(self, first: int, count: int) -> "Mixes":
        """Those of the strategies [first, count], which are numbered anew."""
        own = slice(*np.searchsorted(self.row, (first, first + count)))
        columns = {item.name: getattr(self, item.name)[own] for item in fields(self)[2:]}
        columns["row"] = columns["row"] - first
        return Mixes(upper=self.upper, lower=self.lower, **columns)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Within:
    """What stages must keep: limits of memory, `caps` [K, R] of shares in whole layers, levels.

    `allowed`, `useful`: strategies [K] by level; those that another level beats are not useful.
    """

    limits: Limits
    caps: NDArray[np.bool_]
    allowed: LevelRows
    useful: LevelRows


_TIMES: Final = ("stable_s", "lone_s")
_BYTES: Final = slice(len(_TIMES), None)  # of the outputs of a position: times, then bytes
# Up to so many members a table of all sets is faster than to sort those that there are.
_TABLE: Final = 12
_Parts = tuple[tuple[MemoryLevel, list[Ints]], ...]  # layers of each kind at one or two levels


class StagePosition:
    """All mixes at one position: straight lines in the layers of each kind and level.

    Its rows are the strategies for each of the micro-batches in flight [F], strategies innermost.
    """

    def __init__(
        self, job: Job, lines: StageLines, held: Held, ranges: Ranges, within: Within
    ) -> None:
        self._job, self._lines, self._held = job, lines, held
        self._ranges, self._limits, self._kinds = ranges, within.limits, kinds_of(job, ranges)
        self._outputs = (*_TIMES, *instants(job.platform.runtime), "host_bytes")
        copies = len(held.in_flight)
        self._within_caps = np.tile(within.caps, (copies, 1))
        self._row = np.arange(copies * lines.num_strategies)
        self._allowed, self._useful = (
            {level: np.tile(rows, copies) for level, rows in of.items()}
            for of in (within.allowed, within.useful)
        )
        self._rises: dict[tuple[MemoryLevel, int], Floats] = {}
        self._constants: dict[int, Floats] = {}

    def whole(self, level: MemoryLevel) -> Mixes:
        """All layers at one level."""
        none = np.zeros((len(self._row), len(self._ranges)), dtype=np.int64)
        return self.mix(level, level, self._row, none)

    def mixed(self, upper: MemoryLevel, lower: MemoryLevel) -> Iterator[Mixes]:
        """Some layers at each of two levels, where both times do not fall together."""
        counted = [0, 1, *([-1] if self._limits.shares_host else [])]
        rises = self._differs(upper, lower)[:, counted]
        rising, falling = (rises >= 0).all(axis=(0, 1, 3)), (rises <= 0).all(axis=(0, 1, 3))
        useful = self._useful[upper] & self._useful[lower]
        rows = np.flatnonzero((rising | ~falling) & useful)
        if not rows.size:
            return
        least = self.least(upper, lower, rows)
        yield self.mix(upper, lower, rows, least)
        open_rows = np.flatnonzero(~rising & ~falling & useful)
        further = least[np.searchsorted(rows, open_rows)] + 1
        while open_rows.size and (further < self._ranges.count).any():
            yield self.mix(upper, lower, open_rows, further)
            further = further + 1

    def _differs(self, upper: MemoryLevel, lower: MemoryLevel) -> Floats:
        """How much a layer of each kind takes more at the lower level, [Q, I, F K, R] or R = 1."""
        kinds = range(len(self._kinds))
        return np.stack([self._rise(lower, kind) - self._rise(upper, kind) for kind in kinds])

    def _rise(self, level: MemoryLevel, kind: int) -> Floats:
        """What one more layer adds to every output, [I, F K, R] or R = 1."""
        if (level, kind) not in self._rises:
            row = np.array(self._job.levels.index(level) * len(self._kinds) + kind)
            self._rises[level, kind] = self._lines.rises(self._outputs, row, self._held)
        return self._rises[level, kind]

    def least(self, upper: MemoryLevel, lower: MemoryLevel, rows: Ints) -> Ints:
        """The least number of lower layers, 1 to count - 1, that fits; count - 1 if none does.

        Memory falls with each of them as long as the kinds at either level stay the same.
        """
        if len(self._kinds) == 1:
            return self._bisected(upper, lower, rows, *self._bracket(upper, lower, rows))
        last = np.maximum(self._ranges.count - 1, 1)
        found = np.zeros((len(rows), len(self._ranges)), dtype=np.int64)
        for low, high in self._runs(last):
            tried = self._bisected(upper, lower, rows, low, np.maximum(low, high))
            fits = self._fits(*self._bytes(self._parts(upper, lower, tried), rows))
            found = np.where((found == 0) & fits & (low <= high), tried, found)
        return np.where(found == 0, last, found)

    def _runs(self, last: Ints) -> Iterator[tuple[Ints, Ints]]:
        """Numbers of lower layers, from and to [R], between which no kind comes or goes."""
        start, stop = self._ranges.first, self._ranges.first + self._ranges.count
        changes = [np.ones_like(start)]
        for prefix in self._job.kind_prefix:
            changes.append(np.searchsorted(prefix, prefix[start], side="right") - start)
            changes.append(np.searchsorted(prefix, prefix[stop]) - start)
        begins = np.sort(np.clip(changes, 1, last + 1), axis=0)
        yield from zip(begins, [*(begins[1:] - 1), last], strict=True)

    def _bisected(
        self, upper: MemoryLevel, lower: MemoryLevel, rows: Ints, low: Ints, high: Ints
    ) -> Ints:
        """The least number of lower layers between two that fits; the higher if none does."""
        low, high = (np.broadcast_to(each, (len(rows), len(self._ranges))) for each in (low, high))
        while (low < high).any():
            middle = (low + high) // 2
            fits = self._fits(*self._bytes(self._parts(upper, lower, middle), rows))
            low, high = np.where(fits, low, middle + 1), np.where(fits, middle, high)
            # Entries that are done may pass `high` by one while others still search.
            low = np.minimum(low, high)
        return np.asarray(high)

    def _bracket(self, upper: MemoryLevel, lower: MemoryLevel, rows: Ints) -> tuple[Ints, Ints]:
        """Where the least number of lower layers lies, both ends included, [rows, R].

        Layers that are alike save the same each: a division tells, but for its rounding.
        """
        last = np.maximum(self._ranges.count - 1, 1)
        one = np.ones((len(rows), len(self._ranges)), dtype=np.int64)
        last = np.broadcast_to(last, one.shape)
        num_instants = len(self._outputs) - len(_TIMES) - 1
        most = [*[self._limits.device_bytes] * num_instants, self._limits.host_bytes]
        over = self._values(_BYTES, self._parts(upper, lower, one), rows) - np.reshape(
            most, (-1, 1, 1)
        )
        saved = -self._differs(upper, lower)[0, _BYTES][:, rows]
        with np.errstate(divide="ignore", invalid="ignore"):
            more = np.where(over > 0, np.where(saved > 0, over / saved, np.inf), 0.0)
        guess = more.max(axis=0)
        around = np.ceil(np.minimum(guess, last)).astype(np.int64)
        return np.clip(around, 1, last), np.clip(around + 2, 1, last)

    def mix(self, upper: MemoryLevel, lower: MemoryLevel, rows: Ints, num_lower: Ints) -> Mixes:
        """What stages with these mixes cost; `num_lower` [len(rows), R]."""
        parts = self._parts(upper, lower, num_lower)
        peak_bytes, host_bytes = self._bytes(parts, rows)
        stable_s, lone_s = self._values(slice(len(_TIMES)), parts, rows)
        inside = (num_lower > 0) & (num_lower < self._ranges.count)
        possible = inside if upper is not lower else num_lower == 0
        for level in {upper, lower}:
            possible = possible & self._allowed[level][rows, None]
        possible = possible & self._within_caps[rows]
        return Mixes(
            upper=upper,
            lower=lower,
            row=rows,
            num_lower=num_lower,
            stable_s=stable_s,
            lone_s=lone_s,
            peak_bytes=peak_bytes,
            host_bytes=host_bytes,
            fits=self._fits(peak_bytes, host_bytes) & possible,
        )

    def _fits(self, peak_bytes: Floats, host_bytes: Floats) -> NDArray[np.bool_]:
        limits = self._limits
        return (peak_bytes <= limits.device_bytes) & (host_bytes <= limits.host_bytes)

    def _parts(self, upper: MemoryLevel, lower: MemoryLevel, num_lower: Ints) -> _Parts:
        """Layers of each kind at the two levels, the first `num_lower` of a range at the lower."""
        num_lower = np.minimum(num_lower, self._ranges.count)
        start = self._ranges.first
        below = [num_lower]
        if len(self._kinds) > 1:
            below = [prefix[start + num_lower] - prefix[start] for prefix in self._job.kind_prefix]
        above = [kinds - each for kinds, each in zip(self._kinds, below, strict=True)]
        return ((upper, above), (lower, below)) if upper is not lower else ((upper, above),)

    def _bytes(self, parts: _Parts, rows: Ints) -> tuple[Floats, Floats]:
        """Peak on the device and bytes in host memory."""
        *instants_bytes, host_bytes = self._values(_BYTES, parts, rows)
        return np.max(instants_bytes, axis=0), host_bytes

    def _values(self, outputs: slice, parts: _Parts, rows: Ints) -> Floats:
        """Outputs of mixes with these layers at each level, [I, rows, R]."""
        own = rows if len(rows) < len(self._row) else slice(None)  # a view where all are asked for
        total = np.zeros(1)
        for level, kinds in parts:
            for kind, layers in enumerate(kinds):
                total = total + layers * self._rise(level, kind)[outputs][:, own]
        return np.asarray(self._base(outputs, parts, rows) + total)

    def _base(self, outputs: slice, parts: _Parts, rows: Ints) -> Floats:
        """The part of outputs that depends on which kinds and levels a stage has at all."""
        num_kinds = len(self._kinds)
        bits = [
            (1 << (self._job.levels.index(level) * num_kinds + kind), layers)
            for level, kinds in parts
            for kind, layers in enumerate(kinds)
        ]
        if num_kinds == 1:  # every possible mix has a layer at each of its levels
            return self._constant(sum(bit for bit, _ in bits))[outputs][:, rows, None]
        shape = (len(rows), len(self._ranges))
        sets, number = _distinct([np.broadcast_to(layers > 0, shape) for _, layers in bits])
        lines = np.empty((len(sets), len(rows), len(self._outputs[outputs])))
        for line, members in zip(lines, sets.tolist(), strict=True):
            held = sum(bit for (bit, _), is_in in zip(bits, members, strict=True) if is_in)
            line[:] = self._constant(held)[outputs][:, rows].T
        return np.moveaxis(lines[number, np.arange(len(rows))[:, None]], -1, 0)

    def _constant(self, present: int) -> Floats:
        """b_P of every output, [I, F K]."""
        if present not in self._constants:
            found = self._lines.constants(self._outputs, [present], self._held)
            self._constants[present] = found[:, 0]
        return self._constants[present]


def _distinct(members: Sequence[NDArray[np.bool_]]) -> tuple[NDArray[np.bool_], Ints]:
    """The sets that occur, [sets, members], and the number of each one, [K, R].

    `members`: of each member the sets [K, R] that it is in.
    """
    if len(members) > _TABLE:
        packed = np.packbits(members, axis=0).reshape(-1, members[0].size)
        sets, number = np.unique(packed, axis=1, return_inverse=True)
        unpacked = np.unpackbits(sets, axis=0, count=len(members)).astype(bool)
        return unpacked.T, number.reshape(members[0].shape)
    code = np.zeros(members[0].shape, dtype=np.int64)
    for place, is_in in enumerate(members):
        code |= is_in.astype(np.int64) << place
    occurs = np.bincount(code.ravel(), minlength=1 << len(members)) > 0
    codes = np.flatnonzero(occurs)
    places = np.arange(len(members))
    return (codes[:, None] >> places & 1).astype(bool), (np.cumsum(occurs) - 1)[code]
