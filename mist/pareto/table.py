"""Every stage that a group allows, as arrays over [strategy, position, layer range].

Times rise with the number of recomputed layers, while the peak falls with it (beyond the first,
which adds the working set of a recomputation): so of all numbers of recomputed layers only the
smallest that fits can be on a frontier, and bisection finds it. (Where unlike layers follow each
other the peak may rise again by an activation or two as recomputation reaches a wider one; then a
layer more than needed may be recomputed. What fits is always checked, never inferred.)
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mist.estimate import Job, count_columns, position_columns
from mist.pareto.space import Group, Ints
from mist.spec import SearchSpace

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageTable:
    """Stages of a group. Axes: K strategies, S positions, R layer ranges.

    `first`, `count` [R]: the ranges; where all layers are alike one range stands for all with its
    count, and `alike` is set. `num_full` [K, S, R]: recomputed layers, the fewest that fit.
    `stable_s`, `lone_s` (seconds), `peak_bytes` [K, S, R]: infinite where a range does not leave
    enough layers for the other stages. `feasible` [K, S, R]: fits the limit, too.
    """

    group: Group
    alike: bool
    first: Ints
    count: Ints
    num_full: Ints
    stable_s: Floats
    lone_s: Floats
    peak_bytes: Floats
    feasible: NDArray[np.bool_]


def stage_table(job: Job, group: Group, space: SearchSpace, limit_bytes: float) -> StageTable:
    """Evaluate every stage of a group; `limit_bytes` is what a device may hold."""
    alike = job.facts.num_kinds == 1
    first, count = _ranges(job.num_layers, group.num_stages, alike)
    model = _StageModel(job, group, first, count)
    shape = (group.num_strategies, group.num_stages, len(count))
    num_full = _fewest_that_fit(model, np.broadcast_to(count, shape), space, limit_bytes)
    stage = model(num_full)
    placed = _leaves_enough(job.num_layers, group.num_stages, first, count, alike)
    columns = {name: np.where(placed, column, np.inf) for name, column in stage.items()}
    return StageTable(
        group=group,
        alike=alike,
        first=first,
        count=count,
        num_full=num_full,
        feasible=columns["peak_bytes"] <= limit_bytes,
        stable_s=columns["stable_s"],
        lone_s=columns["lone_s"],
        peak_bytes=columns["peak_bytes"],
    )


class _StageModel:
    """The compiled search formulas with everything fixed but the number of recomputed layers."""

    def __init__(self, job: Job, group: Group, first: Ints, count: Ints) -> None:
        terms = group.columns(job)
        starts = np.arange(group.num_stages) * group.num_devices
        devices = np.stack([starts, np.full_like(starts, group.num_devices)], axis=-1)
        position = position_columns(job, devices, group.num_micro_batches)
        self._job, self._first, self._count = job, first, count
        self._fixed: dict[str, ArrayLike] = {
            name: column[:, None, None] for name, column in terms.items()
        }
        self._fixed |= {name: np.asarray(column)[:, None] for name, column in position.items()}

    def __call__(self, num_full: Ints) -> dict[str, Floats]:
        """stable_s, lone_s, peak_bytes, ... of shape [K, S, R] for `num_full` of that shape."""
        levels = (self._count - num_full, 0, num_full)
        counts = count_columns(self._job, self._first, levels)
        return self._job.cost.search({**self._fixed, **counts})


def _ranges(num_layers: int, num_stages: int, alike: bool) -> tuple[Ints, Ints]:
    """Layer ranges that leave one layer for each other stage."""
    longest = num_layers - num_stages + 1
    if alike:
        count = np.arange(1, longest + 1)
        return np.zeros_like(count), count
    grid = np.meshgrid(np.arange(num_layers), np.arange(1, longest + 1), indexing="ij")
    first, count = (axis.ravel() for axis in grid)
    inside = first + count <= num_layers
    return first[inside], count[inside]


def _leaves_enough(
    num_layers: int, num_stages: int, first: Ints, count: Ints, alike: bool
) -> NDArray[np.bool_]:
    """Position i needs i layers before it and S - 1 - i behind it. Shape [S, R]."""
    stage = np.arange(num_stages)[:, None]
    if alike:
        return np.ones((num_stages, len(count)), dtype=np.bool_)
    behind = num_layers - first - count
    starts = np.where(stage == 0, first == 0, first >= stage)
    ends = np.where(stage == num_stages - 1, behind == 0, behind >= num_stages - 1 - stage)
    return np.asarray(starts & ends)


def _fewest_that_fit(
    model: _StageModel, count: Ints, space: SearchSpace, limit_bytes: float
) -> Ints:
    """The smallest number of recomputed layers whose peak fits, or all of them where none does."""
    if space.checkpoint == "full":
        return count
    none = np.zeros_like(count)
    if space.checkpoint == "none":
        return none
    fits_without = model(none)["peak_bytes"] <= limit_bytes
    low, high = np.ones_like(count), np.array(count)
    while (low < high).any():
        middle = (low + high) // 2
        fits = model(middle)["peak_bytes"] <= limit_bytes
        low, high = np.where(fits, low, np.minimum(middle + 1, high)), np.where(fits, middle, high)
    return np.where(fits_without, none, high)
