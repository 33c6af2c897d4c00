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
from itertools import compress
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from mist.pareto.layer_ranges import Ranges, kinds_of
from mist.pareto.level_choice import LevelRows
from mist.pareto.linear_cost import Held, StageLines, instants
from mist.pareto.strategies import Floats, Ints
from mist.plans.plan import Limits
from mist.plans.workload import MemoryLevel
from mist.symbolic.job import Job

T = TypeVar("T", list[Ints], Floats, Sequence["Pair"])

LevelNames = NDArray[np.object_]
Pair = tuple[MemoryLevel, MemoryLevel]
"""The level of the layers behind, and that of the first ones; one level twice: of all layers."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mixes:
    """N stages with layers at `upper` and the first `num_lower` at `lower`: arrays [N, R].

    `upper`, `lower`, `row` [N]: levels and the strategy. Times in s. `fits`: within the limits, and
    `num_lower` possible.
    """

    upper: LevelNames
    lower: LevelNames
    row: Ints
    num_lower: Ints
    stable_s: Floats
    lone_s: Floats
    peak_bytes: Floats
    host_bytes: Floats
    fits: NDArray[np.bool_]

    @staticmethod
    def joined(parts: Sequence["Mixes"]) -> "Mixes":
        """Several tables, one under the other."""
        if len(parts) == 1:
            return parts[0]
        names = [item.name for item in fields(Mixes)]
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return Mixes(**columns)

    def take(self, rows: NDArray[np.bool_]) -> "Mixes":
        """Some of them."""
        if rows.all():
            return self
        return Mixes(**{item.name: getattr(self, item.name)[rows] for item in fields(Mixes)})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Within:
    """What stages must keep: limits of memory, `caps` [K, R] of shares in whole layers, levels.

    `allowed`, `useful`: strategies [K] by level; those that another level beats are not useful.
    """

    limits: Limits
    caps: NDArray[np.bool_]
    allowed: LevelRows
    useful: LevelRows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rows:
    """N stages to look at together: numpy's calls take the time.

    `pair`: of `pairs`, in their order, `row` of the position [N]. `levels`: numbers of the
    position's levels, upper and lower, [2, N].
    """

    pairs: Sequence[Pair]
    pair: Ints
    row: Ints
    levels: Ints

    def __len__(self) -> int:
        return len(self.row)

    def take(self, rows: NDArray[np.bool_]) -> "_Rows":
        pair, row, levels = self.pair[rows], self.row[rows], self.levels[:, rows]
        return _Rows(pairs=self.pairs, pair=pair, row=row, levels=levels)


_TIMES: Final = ("stable_s", "lone_s")
_ALL: Final = slice(None)  # of the outputs of a position: times, then bytes
_BYTES: Final = slice(len(_TIMES), None)
# Up to so many members a table of all sets is faster than to sort those that there are.
_TABLE: Final = 12
_CHUNK: Final = 1 << 16  # numbers computed together: what a processor's cache holds


def in_cache(items: T, size: int) -> Iterator[T]:
    """As many items at a time as are computed together, of `size` numbers each."""
    chunk = max(1, _CHUNK // max(size, 1))
    for start in range(0, len(items), chunk):
        yield items[start : start + chunk]


class StagePosition:
    """All mixes at one position: straight lines in the layers of each kind and level.

    Its rows are the strategies for each of the micro-batches in flight [F], strategies innermost.
    """

    def __init__(
        self, job: Job, lines: StageLines, held: Held, ranges: Ranges, within: Within
    ) -> None:
        """The levels that layers may have are those of `within`."""
        self._job, self._lines, self._held = job, lines, held
        self._ranges, self._limits, self._kinds = ranges, within.limits, kinds_of(job, ranges)
        self._outputs = (*_TIMES, *instants(job.platform.runtime), "host_bytes")
        copies = len(held.in_flight)
        self._within_caps = np.tile(within.caps, (copies, 1))
        self._num_rows = copies * lines.num_strategies
        self._levels = tuple(within.useful)
        self._allowed, self._useful = (
            np.tile(np.array([*of.values()]), copies) for of in (within.allowed, within.useful)
        )
        kinds = len(self._kinds)
        rows = [job.levels.index(level) * kinds + q for level in self._levels for q in range(kinds)]
        rises = lines.rises(self._outputs, np.array(rows), held)
        # What one more layer adds to every output, [I, L Q F K, R] or R = 1.
        self._rises = rises.reshape(len(rises), -1, rises.shape[-1])
        self._constants: dict[tuple[int, ...], Floats] = {}

    def mixes(self, levels: Sequence[MemoryLevel], pairs: Sequence[Pair]) -> Iterator[Mixes]:
        """Those of one level for all layers, then those of two of which none beats them all."""
        size = self._num_rows * len(self._ranges)
        for some in in_cache([(level, level) for level in levels], size):
            yield self.mix(some, np.zeros((1, 1), dtype=np.int64))
        for some in in_cache(pairs, size):
            yield from self._mixed(some)

    def mix(self, pairs: Sequence[Pair], num_lower: Ints) -> Mixes:
        """What stages of every row cost with these levels; `num_lower` [len(pairs) F K, R]."""
        return self._mix(self._all(pairs), num_lower)

    def least(self, pair: Pair) -> Ints:
        """The least number of lower layers that fits, [F K, R], as in `_least`."""
        return self._least(self._all([pair]))

    def _all(self, pairs: Sequence[Pair]) -> _Rows:
        every = np.ones((len(pairs), self._num_rows), dtype=np.bool_)
        return self._rows(pairs, every)

    def _rows(self, pairs: Sequence[Pair], chosen: NDArray[np.bool_]) -> _Rows:
        """The chosen rows [P, F K] of each pair."""
        pair, row = np.nonzero(chosen)
        return _Rows(pairs=pairs, pair=pair, row=row, levels=self._numbers(pairs)[:, pair])

    def _mixed(self, pairs: Sequence[Pair]) -> Iterator[Mixes]:
        """Some layers at each of two levels, where both times do not fall together."""
        counted = [0, 1, *([-1] if self._limits.shares_host else [])]
        upper, lower = self._numbers(pairs)
        of_level = self._rises[counted].reshape(
            len(counted), len(self._levels), len(self._kinds), self._num_rows, -1
        )
        more = of_level[:, lower] - of_level[:, upper]
        rising, falling = (more >= 0).all(axis=(0, 2, 4)), (more <= 0).all(axis=(0, 2, 4))
        useful = self._useful[upper] & self._useful[lower]
        rows = self._rows(pairs, (rising | ~falling) & useful)
        if not len(rows):
            return
        least = self._least(rows)
        yield self._mix(rows, least)
        is_open = ~np.asarray(rising | falling)[rows.pair, rows.row]
        rows, further = rows.take(is_open), least[is_open] + 1
        while len(rows) and (further < self._ranges.count).any():
            yield self._mix(rows, further)
            further = further + 1

    def _numbers(self, pairs: Sequence[Pair]) -> Ints:
        """Upper and lower level of each pair as numbers of the position's levels, [2, P]."""
        return np.array([[self._levels.index(level) for level in pair] for pair in pairs]).T

    def _least(self, rows: _Rows) -> Ints:
        """The least number of lower layers, 1 to count - 1, that fits; count - 1 if none does.

        Memory falls with each of them as long as the kinds at either level stay the same.
        """
        if len(self._kinds) == 1:
            return self._bisected(rows, *self._bracket(rows))
        last = np.maximum(self._ranges.count - 1, 1)
        shape = (len(rows), len(self._ranges))
        low, high = (np.broadcast_to(last, shape) for _ in range(2))
        is_open = np.ones(shape, dtype=np.bool_)
        # The first run that fits at its end has the least number.
        for begin, end in self._runs(last):
            wanted = is_open & (begin <= end)
            some = np.asarray(wanted.any(axis=1))
            if some.any():
                ends = np.maximum(begin, end)[None]
                wanted[some] &= self._fits(*self._bytes(rows.take(some), ends))
                low, high = np.where(wanted, begin, low), np.where(wanted, end, high)
                is_open &= ~wanted
        return self._bisected(rows, low, high)

    def _runs(self, last: Ints) -> Iterator[tuple[Ints, Ints]]:
        """Numbers of lower layers, from and to [R], between which no kind comes or goes."""
        start, stop = self._ranges.first, self._ranges.first + self._ranges.count
        changes = [np.ones_like(start)]
        for prefix in self._job.kind_prefix:
            changes.append(np.searchsorted(prefix, prefix[start], side="right") - start)
            changes.append(np.searchsorted(prefix, prefix[stop]) - start)
        begins = np.sort(np.clip(changes, 1, last + 1), axis=0)
        yield from zip(begins, [*(begins[1:] - 1), last], strict=True)

    def _bisected(self, rows: _Rows, low: Ints, high: Ints) -> Ints:
        """The least number of lower layers between two that fits; the higher if none does."""
        shape = (len(rows), len(self._ranges))
        low, high = (np.broadcast_to(each, shape) for each in (low, high))
        while (low < high).any():
            middle = (low + high) // 2
            fits = self._fits(*self._bytes(rows, middle))
            low, high = np.where(fits, low, middle + 1), np.where(fits, middle, high)
            # Entries that are done may pass `high` by one while others still search.
            low = np.minimum(low, high)
        return np.asarray(high)

    def _bracket(self, rows: _Rows) -> tuple[Ints, Ints]:
        """Where the least number of lower layers lies, both ends included, [N, R].

        Layers that are alike save the same each: a division tells, but for its rounding.
        """
        last = np.maximum(self._ranges.count - 1, 1)
        one = np.ones((len(rows), len(self._ranges)), dtype=np.int64)
        last = np.broadcast_to(last, one.shape)
        num_instants = len(self._outputs) - len(_TIMES) - 1
        most = [*[self._limits.device_bytes] * num_instants, self._limits.host_bytes]
        over = self._values(_BYTES, rows, one) - np.reshape(most, (-1, 1, 1))
        upper, lower = (self._rises[_BYTES, at] for at in self._at(rows, 0))
        saved = upper - lower
        with np.errstate(divide="ignore", invalid="ignore"):
            more = np.where(over > 0, np.where(saved > 0, over / saved, np.inf), 0.0)
        guess = more.max(axis=0)
        around = np.ceil(np.minimum(guess, last)).astype(np.int64)
        return np.clip(around, 1, last), np.clip(around + 2, 1, last)

    def _mix(self, rows: _Rows, num_lower: Ints) -> Mixes:
        """What stages with these mixes cost; `num_lower` [N, R]."""
        num_lower = np.broadcast_to(num_lower, (len(rows), len(self._ranges)))
        stable_s, lone_s, *instants_bytes, host_bytes = self._values(_ALL, rows, num_lower)
        peak_bytes = np.max(instants_bytes, axis=0)
        upper, lower = rows.levels
        inside = (num_lower > 0) & (num_lower < self._ranges.count)
        possible = np.where((upper == lower)[:, None], num_lower == 0, inside)
        possible &= (self._allowed[upper, rows.row] & self._allowed[lower, rows.row])[:, None]
        possible &= self._within_caps[rows.row]
        levels = np.array(self._levels, dtype=object)
        return Mixes(
            upper=levels[upper],
            lower=levels[lower],
            row=rows.row,
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

    def _layers(self, num_lower: Ints) -> tuple[list[Ints], list[Ints]]:
        """Layers of each kind at the upper level, and of the first `num_lower` at the lower one."""
        num_lower = np.minimum(num_lower, self._ranges.count)
        start = self._ranges.first
        below = [num_lower]
        if len(self._kinds) > 1:
            below = [prefix[start + num_lower] - prefix[start] for prefix in self._job.kind_prefix]
        return [kinds - each for kinds, each in zip(self._kinds, below, strict=True)], below

    def _bytes(self, rows: _Rows, num_lower: Ints) -> tuple[Floats, Floats]:
        """Peak on the device and bytes in host memory."""
        *instants_bytes, host_bytes = self._values(_BYTES, rows, num_lower)
        return np.max(instants_bytes, axis=0), host_bytes

    def _at(self, rows: _Rows, kind: int) -> Ints:
        """Where `_rises` has a layer of a kind at the upper and at the lower level, [2, N]."""
        first = (rows.levels * len(self._kinds) + kind) * self._num_rows
        return np.asarray(first + rows.row)

    def _values(self, outputs: slice, rows: _Rows, num_lower: Ints) -> Floats:
        """Outputs of mixes with so many lower layers, [I, N, R]."""
        above, below = self._layers(num_lower)
        are_mixed = any(upper is not lower for upper, lower in rows.pairs)
        shape = (len(self._outputs[outputs]), len(rows), len(self._ranges))
        total, term = np.zeros(shape), np.empty(shape)
        for side, layers in enumerate((above, below) if are_mixed else (above,)):
            for kind, each in enumerate(layers):
                np.multiply(each, self._rises[outputs, self._at(rows, kind)[side]], out=term)
                total += term
        total += self._base(outputs, rows, (*above, *below))
        return total

    def _base(self, outputs: slice, rows: _Rows, layers: Sequence[Ints]) -> Floats:
        """The part of outputs that depends on which kinds and levels a stage has at all.

        `layers`: of each kind at the upper, then at the lower level.
        """
        num_kinds = len(self._kinds)
        firsts = [[self._job.levels.index(level) * num_kinds for level in p] for p in rows.pairs]
        if num_kinds == 1:  # every possible mix has a layer at each of its levels
            present = tuple(1 << upper | 1 << lower for upper, lower in firsts)
            return self._constant(present)[outputs, rows.pair, rows.row][..., None]
        shape = (len(rows), len(self._ranges))
        is_in = np.stack([np.broadcast_to(each > 0, shape) for each in layers])
        base = np.empty((len(self._outputs[outputs]), *shape))
        ends = np.searchsorted(rows.pair, np.arange(len(firsts) + 1))
        for first, begin, end in zip(firsts, ends[:-1], ends[1:], strict=True):
            if begin == end:
                continue
            bits = [1 << (level + kind) for level in first for kind in range(num_kinds)]
            sets, number = _distinct(is_in[:, begin:end])
            present = tuple(sum(set(compress(bits, members))) for members in sets)
            own = rows.row[begin:end, None]
            base[:, begin:end] = self._constant(present)[outputs, number, own]
        return base

    def _constant(self, present: tuple[int, ...]) -> Floats:
        """b_P of every output for each P, [I, P, F K]."""
        if present not in self._constants:
            self._constants[present] = self._lines.constants(self._outputs, present, self._held)
        return self._constants[present]


def _distinct(members: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], Ints]:
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
