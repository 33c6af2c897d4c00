"""Measured tables of operations: times on a grid of sizes, between its points and beyond them.

    operation            sizes of the grid             what a point is
    gemm                 m, n, k                       one product (m, k) x (k, n)
    attention_forward    sequences, seq, head_dim      the flash kernel with a causal mask over
    attention_backward   the same                      batch * heads sequences of seq tokens

    inside the grid      log T = multilinear in the logarithms of the sizes
    anywhere             T(x) = T(x') law(x) / law(x'),  x' = the point of the grid nearest to x

So the law's shape carries on from the border of the grid, without a step there. The same ratio
gives what no point of the grid is: a batch of products (x' is one of them; `batch` products of m
rows are not one of batch * m rows, because each has a matrix of its own), attention without a mask,
and queries and keys of different lengths (`seq` is that of the keys).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mist.plans.provenance import Kind
from mist.plans.workload import Precision
from mist.platform.quantity import Record
from mist.units import MICROSECOND

F64 = NDArray[np.float64]
Arrays = Sequence[F64]
Law = Callable[[Arrays], F64]


class TabledOp(StrEnum):
    """Operations that a device may have tables of, in the order of a plan's op costs."""

    GEMM = "gemm"
    ATTENTION_FORWARD = "attention_forward"
    ATTENTION_BACKWARD = "attention_backward"


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """Sizes of an operation's grid: their names, and how its law's arguments become them.

    `sizes`: arguments of the law to sizes; `point`: sizes to the arguments of that grid point.
    """

    names: tuple[str, ...]
    sizes: Callable[[Arrays], Arrays]
    point: Callable[[Arrays], Arrays]


def _product_sizes(arguments: Arrays) -> Arrays:
    _, m, n, k = arguments
    return m, n, k


def _product_point(sizes: Arrays) -> Arrays:
    return np.ones(()), *sizes


def _attention_sizes(arguments: Arrays) -> Arrays:
    batch, heads, _, seq_k, head_dim, _ = arguments
    return batch * heads, seq_k, head_dim


def _attention_point(sizes: Arrays) -> Arrays:
    sequences, seq, head_dim = sizes
    one = np.ones(())
    return one, sequences, seq, seq, head_dim, one


_ATTENTION = Axes(
    names=("sequences", "seq", "head_dim"), sizes=_attention_sizes, point=_attention_point
)
AXES: Final[Mapping[TabledOp, Axes]] = {
    TabledOp.GEMM: Axes(names=("m", "n", "k"), sizes=_product_sizes, point=_product_point),
    TabledOp.ATTENTION_FORWARD: _ATTENTION,
    TabledOp.ATTENTION_BACKWARD: _ATTENTION,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OpTable(Record):
    """Measured times of one operation in one precision: a row per point of a regular grid.

    `columns`: the sizes of the operation (`AXES`), then "us". `rows`, in any order, hold every
    combination of their sizes once. `own`: measured on this machine, not published. Raises
    ValueError when the rows are no such grid, or a number is not positive.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[float, ...], ...]
    source: str
    kind: Kind
    own: bool = False

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise ValueError("source is empty: say where the times come from")
        if not self.rows:
            raise ValueError("rows is empty: a grid has at least one point")
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"rows must be of {len(self.columns)} numbers each")
        if not all(0 < number < math.inf for row in self.rows for number in row):
            raise ValueError("sizes and times must be positive")
        # Rows are a full grid if there are as many as points, and no two of the same sizes.
        num_points, num_different = math.prod(self.shape), len({row[:-1] for row in self.rows})
        if not len(self.rows) == num_different == num_points:
            raise ValueError(
                f"a grid of {' x '.join(map(str, self.shape))} sizes has {num_points} rows, "
                f"all different; found {len(self.rows)}, {num_different} of them different"
            )

    @property
    def axes(self) -> tuple[tuple[float, ...], ...]:
        """The sizes along each axis of the grid, rising."""
        return tuple(tuple(sorted(set(sizes))) for sizes in list(zip(*self.rows, strict=True))[:-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """How many sizes each axis has."""
        return tuple(len(sizes) for sizes in self.axes)


Tables = Mapping[TabledOp, Mapping[Precision, OpTable]]


def check_columns(tables: Tables) -> None:
    """Raises ValueError when a table's columns are not those of its operation."""
    for op, by_precision in tables.items():
        columns = (*AXES[op].names, "us")
        for precision, table in by_precision.items():
            if table.columns != columns:
                raise ValueError(
                    f"tables.{op}.{precision}: columns must be {', '.join(columns)}, "
                    f"found {', '.join(table.columns)}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeGrid:
    """A table ready to be asked.

    `sizes`: one rising array per axis, of lengths K1, K2, ...; `log_seconds[K1, K2, ...]`.
    """

    op: TabledOp
    sizes: tuple[F64, ...]
    log_seconds: F64

    @classmethod
    def of(cls, op: TabledOp, table: OpTable) -> "TimeGrid":
        """The grid of a table of that operation."""
        # Sorted rows are the grid in C order, the last size varying fastest.
        times_us = np.asarray([row[-1] for row in sorted(table.rows)], dtype=np.float64)
        return cls(
            op=op,
            sizes=tuple(np.asarray(sizes, dtype=np.float64) for sizes in table.axes),
            log_seconds=np.log(MICROSECOND * times_us).reshape(table.shape),
        )

    def seconds(self, arguments: Arrays, law: Law) -> F64:
        """Time in s at the arguments of the operation's law; arrays broadcast."""
        axes = AXES[self.op]
        sizes = axes.sizes(arguments)
        # The grid has the time of the nearest point, the ratio of laws carries on from there.
        nearest = [
            np.clip(size, known[0], known[-1])
            for size, known in zip(sizes, self.sizes, strict=True)
        ]
        result: F64 = self._inside(nearest) * (law(arguments) / law(axes.point(nearest)))
        return result

    def _inside(self, sizes: Arrays) -> F64:
        """Time in s at sizes within the grid: the corners of the cell, weighted."""
        cell = [_between(size, known) for size, known in zip(sizes, self.sizes, strict=True)]
        total: F64 = np.zeros(())
        # Multilinear: each of the 2**n corners with the product of its weights along the axes.
        for ends in product((0, 1), repeat=len(cell)):
            weight = math.prod(side[end].weight for side, end in zip(cell, ends, strict=True))
            index = tuple(side[end].at for side, end in zip(cell, ends, strict=True))
            total = total + weight * self.log_seconds[index]
        result: F64 = np.exp(total)
        return result


class _End(NamedTuple):
    """One end of an interval on an axis: the index of its size, and its weight (0..1)."""

    at: NDArray[np.intp]
    weight: F64


def _between(sizes: F64, known: F64) -> tuple[_End, _End]:
    """The interval of an axis, in logarithms, that each size lies in."""
    last = known.size - 1
    place = np.interp(np.log(sizes), np.log(known), np.arange(known.size, dtype=np.float64))
    # An axis of one size has no interval: low stays at 0 with weight 1.
    low = np.minimum(place.astype(np.intp), max(last - 1, 0))
    toward = place - low
    return _End(low, 1.0 - toward), _End(np.minimum(low + 1, last), toward)
