"""The points that a stage may take: of all its mixes, those that none beats in (stable, lone)."""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from mist.pareto.frontier import frontier, lean_frontier
from mist.pareto.stage_mixes import LevelNames, Mixes
from mist.pareto.strategies import Floats, Ints


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Points:
    """P points of one stage and layer range. Times in s; `row` of the strategies.

    The first `num_lower` layers are at the level `lower`, the others at `upper`.
    """

    stable_s: Floats
    lone_s: Floats
    weight_s: Floats
    peak_bytes: Floats
    host_bytes: Floats
    row: Ints
    num_lower: Ints
    upper: LevelNames
    lower: LevelNames

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageMixes(Mixes):
    """All mixes of a position, [N, R], and seconds of gradients of weights, [R]."""

    weight_s: Floats

    @classmethod
    def of(cls, mixes: Mixes, weight_s: Floats) -> "StageMixes":
        """Mixes of one position."""
        columns = {item.name: getattr(mixes, item.name) for item in fields(mixes)}
        return cls(weight_s=weight_s, **columns)

    def points(self, rows: Ints, columns: Ints) -> Points:
        """Rows and their ranges, both [P], as points."""
        wide = ("stable_s", "lone_s", "peak_bytes", "host_bytes", "num_lower")
        return Points(
            weight_s=self.weight_s[columns],
            row=self.row[rows],
            upper=self.upper[rows],
            lower=self.lower[rows],
            **{name: getattr(self, name)[rows, columns] for name in wide},
        )

    def frontier(self, column: int, useful: NDArray[np.bool_]) -> Points:
        """The non-dominated points of one range among the useful ones."""
        found = frontier(
            self.stable_s[:, column], self.lone_s[:, column], self.peak_bytes[:, column], useful
        )
        return self.points(found.choice, np.full(len(found), column))

    def lean_frontier(self, column: int, useful: NDArray[np.bool_]) -> Points:
        """The same, where less host memory counts as well."""
        columns = (self.stable_s[:, column], self.lone_s[:, column], self.host_bytes[:, column])
        rows = lean_frontier(*columns, useful)
        return self.points(rows, np.full(len(rows), column))
