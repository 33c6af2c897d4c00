"""Exhaustive enumeration of small inter-stage problems, by the form of the objective in the paper.

`optimum` shares nothing with the code under test: no (t, u) identity, no bounds, no ordering. What
a stage adds to filling and draining is t in the paper; here it is f = (t - w) / v.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from mist.milp import Cell, InterStageProblem
from mist.schedule import step_time

Times = tuple[float, float, float]


def assignments(problem: InterStageProblem) -> Iterator[list[Times]]:
    """(stable, lone, fill) per stage of every assignment that covers the layers in order."""

    def extend(stage: int, begin: int) -> Iterator[list[Times]]:
        if stage == problem.num_stages:
            if begin == problem.num_layers:
                yield []
            return
        for cell in problem.cells:
            if cell.stage != stage or (cell.first is not None and cell.first != begin):
                continue
            if begin + cell.count > problem.num_layers:
                continue
            for rest in extend(stage + 1, begin + cell.count):
                for stable, lone in zip(cell.stable_s, cell.lone_s, strict=True):
                    fill = (float(stable) - cell.spare_s) / problem.num_chunks
                    yield [(float(stable), float(lone), fill), *rest]

    return extend(0, 0)


def paper_step(num_micro_batches: int, times: list[Times]) -> float:
    """(G - 1) max t + sum f + max (u_i - f_i - sum_{j<i} f_j); with f = t, u - f is delta."""
    total, worst = 0.0, -np.inf
    for _, lone, fill in times:
        worst = max(worst, lone - fill - total)
        total += fill
    return (num_micro_batches - 1) * max(stable for stable, _, _ in times) + total + worst


def optimum(problem: InterStageProblem) -> float:
    """Least step time in seconds; inf when no assignment exists."""
    found = (paper_step(problem.num_micro_batches, times) for times in assignments(problem))
    return min(found, default=np.inf)


def optimum_of_many(problem: InterStageProblem) -> float:
    """The same for alike layers and some 100,000 assignments, all points of a choice of cells at
    once. Uses `step_time`, which tests/test_schedule.py checks against the paper's form."""
    per_stage = [[c for c in problem.cells if c.stage == i] for i in range(problem.num_stages)]
    best = np.inf
    for cells in itertools.product(*per_stage):
        if sum(c.count for c in cells) != problem.num_layers:
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
