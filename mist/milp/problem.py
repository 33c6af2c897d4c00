"""The inter-stage problem: which stage takes how many layers, and which point of which frontier.

A cell is a frontier of stage i for a number of layers. A solution chooses, for each stage, one cell
and one of its points, so that the layers add up and the step time of `mist.schedule` is least.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mist.schedule import step_time

Method = Literal["milp", "dp", "both"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cell:
    """The points that `stage` (from 0) may choose when it holds `count` layers.

    `first`: index of the first of these layers, or None where all layers are alike. `stable_s` [P],
    seconds, ascending; `lone_s` [P], seconds, descending; none negative: the columns of a
    `mist.pareto.frontier.Frontier`. P may be 0. `spare_s`: seconds of each stable time in which the
    stage need not keep others waiting while the pipeline fills and drains (w of `mist.schedule`;
    0 unless the schedule is zero bubble). Raises ValueError when that is not so.
    """

    stage: int
    first: int | None
    count: int
    stable_s: NDArray[np.float64]
    lone_s: NDArray[np.float64]
    spare_s: float = 0.0

    def __post_init__(self) -> None:
        if self.stage < 0 or self.count < 1 or (self.first or 0) < 0:
            raise ValueError(
                f"cell of stage {self.stage}: layers from {self.first}, count {self.count}"
            )
        fault = _fault_of_times(self.stable_s, self.lone_s, self.spare_s)
        if fault is not None:
            raise ValueError(f"cell of stage {self.stage}: {fault}")


def _fault_of_times(
    stable_s: NDArray[np.float64], lone_s: NDArray[np.float64], spare_s: float
) -> str | None:
    """Why these are not the times of a frontier; None when they are."""
    if stable_s.ndim != 1 or stable_s.shape != lone_s.shape:
        return f"{stable_s.shape} and {lone_s.shape} differ"
    if not all(np.isfinite(times).all() and np.all(times >= 0) for times in (stable_s, lone_s)):
        return "times must be finite and not negative"
    if np.any(np.diff(stable_s) < 0) or np.any(np.diff(lone_s) > 0):
        return "stable_s must rise and lone_s fall"
    if not 0.0 <= spare_s <= np.min(stable_s, initial=np.inf):
        return f"spare_s {spare_s} must be within 0 and the least stable_s"
    return None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InterStageProblem:
    """`num_layers` layers over `num_stages` stages, for `num_micro_batches` (G) per step.

    `num_chunks`: v, the pieces of a stage's layers that take turns (1: they do not). The cells of
    all stages; either all have `first` None (layers are alike: only counts matter) or
    none has (the chosen cells must follow each other from layer 0 to `num_layers`). Raises
    ValueError when a size is not positive or a cell lies outside.
    """

    num_layers: int
    num_stages: int
    num_micro_batches: int
    cells: tuple[Cell, ...]
    num_chunks: int = 1

    def __post_init__(self) -> None:
        sizes = (self.num_layers, self.num_stages, self.num_micro_batches, self.num_chunks)
        if min(sizes) < 1:
            raise ValueError("layers, stages, micro-batches and chunks must be at least 1")
        if len({cell.first is None for cell in self.cells}) > 1:
            raise ValueError("either every cell names its first layer, or none does")
        for cell in self.cells:
            inside = (cell.first or 0) + cell.count <= self.num_layers
            if cell.stage >= self.num_stages or not inside:
                raise ValueError(
                    f"cell (stage {cell.stage}, first {cell.first}, count {cell.count}) is outside "
                    f"{self.num_stages} stages, {self.num_layers} layers"
                )

    def fill_s(self, cell: Cell) -> NDArray[np.float64]:
        """Seconds [P] that each point adds to filling and draining: (t - w) / v, ascending."""
        return (cell.stable_s - cell.spare_s) / self.num_chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a stage takes: `point` (index into the cell's arrays) of `cell` (index into `cells`)."""

    stage: int
    cell: int
    point: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InterStageSolution:
    """The best choices found, stage by stage, and the proof of how good they are.

    `step_s`: seconds of one step by `mist.schedule.step_time`. `lower_bound_s`: no assignment is
    faster. `num_nodes`: of the branch and bound that gave the bound. Nothing here depends on the
    clock: the same problem gives the same solution.
    """

    step_s: float
    lower_bound_s: float
    choices: tuple[Choice, ...]
    num_nodes: int

    def __post_init__(self) -> None:
        if self.lower_bound_s > self.step_s:
            raise ValueError(f"bound {self.lower_bound_s} s above the step {self.step_s} s")

    @property
    def gap(self) -> float:
        """Share of `step_s` by which an optimum could still be faster; 0 is proven optimal."""
        return (self.step_s - self.lower_bound_s) / abs(self.step_s) if self.step_s else 0.0


def chosen_times(
    problem: InterStageProblem, choices: Sequence[Choice]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Stable, lone and fill seconds of the chosen points, each of shape [S], first stage first."""
    chosen = [(problem.cells[choice.cell], choice.point) for choice in choices]
    stable_s = np.array([cell.stable_s[point] for cell, point in chosen])
    lone_s = np.array([cell.lone_s[point] for cell, point in chosen])
    return stable_s, lone_s, np.array([problem.fill_s(cell)[point] for cell, point in chosen])


def chosen_step(problem: InterStageProblem, choices: Sequence[Choice]) -> float:
    """Seconds of one step with these choices."""
    return float(step_time(problem.num_micro_batches, *chosen_times(problem, choices)))
