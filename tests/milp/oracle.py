"""Exhaustive enumeration of small inter-stage problems, by the form of the objective in the paper.

`optimum` shares nothing with the code under test: no (t, u) identity, no bounds, no ordering. What
a stage adds to filling and draining is t in the paper; here it is f = (t - w) / v.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from mist.milp import Cell, InterStageProblem, Shared
from mist.plans.schedules import step_time

Point = tuple[Cell, int]


def assignments(problem: InterStageProblem) -> Iterator[list[Point]]:
    """A point per stage, for every assignment that covers the layers and the units in order."""

    def extend(stage: int, begin: int, unit: int) -> Iterator[list[Point]]:
        if stage == problem.num_stages:
            if begin == problem.num_layers and unit == (problem.num_units or 0):
                yield []
            return
        for cell in problem.cells:
            if cell.stage != stage or (cell.first is not None and cell.first != begin):
                continue
            if cell.offsets is not None and unit not in cell.offsets:
                continue
            units = 0 if problem.num_units is None else cell.units
            if begin + cell.count > problem.num_layers or unit + units > (problem.num_units or 0):
                continue
            for rest in extend(stage + 1, begin + cell.count, unit + units):
                for point in range(cell.stable_s.size):
                    yield [(cell, point), *rest]

    return extend(0, 0, 0)


def paper_step(problem: InterStageProblem, points: list[Point]) -> float:
    """(G - 1) max t + sum f + max (u_i - f_i - sum_{j<i} f_j); with f = t, u - f is delta."""
    total, worst, bottleneck = 0.0, -np.inf, 0.0
    for cell, point in points:
        stable, lone = float(cell.stable_s[point]), float(cell.lone_s[point])
        fill = (stable - cell.spare_s) / problem.num_chunks
        worst = max(worst, lone - fill - total)
        total += fill
        bottleneck = max(bottleneck, stable)
    return (problem.num_micro_batches - 1) * bottleneck + total + worst


def keeps_limits(problem: InterStageProblem, points: list[Point]) -> bool:
    """No shared limit on host memory is exceeded."""
    return all(
        sum(points[stage][0].host_bytes[points[stage][1]] for stage in shared.stages)
        <= shared.limit_bytes
        for shared in problem.shared
    )


def agrees(points: list[Point]) -> bool:
    """Whether the chosen cells that have a tie have the same."""
    return len({cell.tie for cell, _ in points if cell.tie is not None}) <= 1


def optimum(problem: InterStageProblem) -> float:
    """Least step time in seconds; inf when no assignment exists."""
    found = (
        paper_step(problem, points)
        for points in assignments(problem)
        if keeps_limits(problem, points) and agrees(points)
    )
    return min(found, default=np.inf)


def optimum_of_many(problem: InterStageProblem) -> float:
    """The same for some 100,000 assignments, all points of a choice of cells at once.

    Layers are alike, units have no offsets. Uses `step_time`, which tests/test_schedules.py checks
    against the paper's form.
    """
    per_stage = [[c for c in problem.cells if c.stage == i] for i in range(problem.num_stages)]
    best = np.inf
    for cells in itertools.product(*per_stage):
        if sum(c.count for c in cells) != problem.num_layers:
            continue
        if problem.num_units not in (None, sum(c.units for c in cells)):
            continue
        stable = np.stack(np.meshgrid(*(c.stable_s for c in cells)), axis=-1)
        lone = np.stack(np.meshgrid(*(c.lone_s for c in cells)), axis=-1)
        fill = (stable - [c.spare_s for c in cells]) / problem.num_chunks
        best = min(best, step_time(problem.num_micro_batches, stable, lone, fill).min())
    return float(best)


def dense_problem(
    seed: int, *, num_layers: int, num_stages: int, num_micro_batches: int, num_points: int
) -> InterStageProblem:
    """Alike layers and full frontiers: cells within 2 of the even count, deltas of both signs."""
    rng = np.random.default_rng(seed)
    even = num_layers // num_stages
    cells = [
        Cell(
            stage=stage,
            first=None,
            count=count,
            stable_s=np.sort(count * rng.uniform(1.0, 1.5, num_points)),
            lone_s=np.sort(count * rng.uniform(0.6, 2.7, num_points))[::-1].copy(),
        )
        for stage in range(num_stages)
        for count in range(max(1, even - 2), even + 3)
    ]
    return InterStageProblem(
        num_layers=num_layers,
        num_stages=num_stages,
        num_micro_batches=num_micro_batches,
        cells=tuple(cells),
    )


def random_problem(seed: int, *, max_layers: int, max_stages: int) -> InterStageProblem:
    """Any small problem: alike layers or not, deltas of both signs, ties, missing cells, any
    schedule."""
    rng = np.random.default_rng(seed)
    num_stages = int(rng.integers(1, max_stages + 1))
    num_layers = int(rng.integers(num_stages, max_layers + 1))
    alike = bool(rng.integers(2))
    whole = bool(rng.integers(2))  # whole seconds make ties common
    cells = []
    for stage in range(num_stages):
        for count in range(1, num_layers + 1):
            firsts = [None] if alike else range(num_layers - count + 1)
            cells += [
                random_cell(rng, stage, first, count, whole)
                for first in firsts
                if rng.uniform() < 0.9
            ]
    return InterStageProblem(
        num_layers=num_layers,
        num_stages=num_stages,
        num_micro_batches=int(rng.choice([1, 2, 4, 16, 64])),
        cells=tuple(cells[index] for index in rng.permutation(len(cells))),
        num_chunks=int(rng.choice([1, 1, 2, 3])),
    )


def random_cell(
    rng: np.random.Generator, stage: int, first: int | None, count: int, whole: bool
) -> Cell:
    """0 to 3 points whose deltas lie in [-stable, 3 * stable]; half of the cells can spare time."""
    size = int(rng.choice([0, 1, 2, 3], p=[0.1, 0.3, 0.3, 0.3]))
    stable, lone = np.sort(count * rng.uniform(0.5, 2.0, size)), count * rng.uniform(0, 6, size)
    if whole:
        stable, lone = np.ceil(stable), np.ceil(lone)
    spare = float(rng.choice([0.0, rng.uniform(0, stable.min(initial=1.0))]))
    return Cell(
        stage=stage,
        first=first,
        count=count,
        stable_s=stable,
        lone_s=np.sort(lone)[::-1].copy(),
        spare_s=spare,
    )


def with_units(problem: InterStageProblem, seed: int) -> InterStageProblem:
    """The same layers on devices that the stages share unevenly: 1, 2 or 4 units each.

    A stage with more units is faster by a random factor. A third of the problems lets stages begin
    anywhere, a third at multiples of their units, a third at random units.
    """
    rng = np.random.default_rng(seed)
    num_units = int(rng.integers(problem.num_stages, 2 * problem.num_stages + 2))
    cells = []
    for cell in problem.cells:
        for units in (1, 2, 4):
            if units > num_units or rng.uniform() < 0.3:
                continue
            speed = rng.uniform(0.6, 1.0) * units
            begins = range(num_units - units + 1)
            offsets = [None, begins[::units], tuple(b for b in begins if rng.uniform() < 0.7)]
            cells.append(
                replace(
                    cell,
                    units=units,
                    offsets=None if seed % 3 == 0 else tuple(offsets[seed % 3]),
                    stable_s=cell.stable_s / speed,
                    lone_s=cell.lone_s / speed,
                    spare_s=cell.spare_s / speed,
                )
            )
    return replace(problem, num_units=num_units, cells=tuple(cells))


def with_ties(problem: InterStageProblem, seed: int) -> InterStageProblem:
    """The same, where the first and the last stage have up to three ways that must agree.

    Each way is slower or faster by a random factor of its own at either end, and may be missing.
    """
    rng = np.random.default_rng(seed)
    ends = (0, problem.num_stages - 1)
    cells = []
    for cell in problem.cells:
        for way in range(3) if cell.stage in ends else (None,):
            speed = 1.0 if way is None else float(rng.uniform(0.5, 2.0))
            if way is None or rng.uniform() < 0.8:
                cells.append(
                    replace(
                        cell,
                        tie=None if way is None else (way, 1),
                        stable_s=cell.stable_s / speed,
                        lone_s=cell.lone_s / speed,
                        spare_s=cell.spare_s / speed,
                    )
                )
    return replace(problem, cells=tuple(cells[i] for i in rng.permutation(len(cells))))


def with_host(problem: InterStageProblem, seed: int) -> InterStageProblem:
    """The same problem with a node of host memory that the first two stages share.

    Points take 0 to 10 bytes, the more the faster they are; some are dominated in time alone.
    """
    rng = np.random.default_rng(seed)
    cells = []
    for cell in problem.cells:
        size = cell.stable_s.size
        order = rng.permutation(2 * size)
        slower = rng.uniform(1.0, 1.3, size)
        host = np.concatenate([rng.uniform(3, 10, size), rng.uniform(0, 5, size)])
        cells.append(
            replace(
                cell,
                stable_s=np.concatenate([cell.stable_s, cell.stable_s * slower])[order],
                lone_s=np.concatenate([cell.lone_s, cell.lone_s * slower])[order],
                host_bytes=host[order],
            )
        )
    stages = tuple(range(min(2, problem.num_stages)))
    limit = Shared(stages=stages, limit_bytes=float(rng.uniform(2, 12) * len(stages)))
    return replace(problem, cells=tuple(cells), shared=(limit,))
