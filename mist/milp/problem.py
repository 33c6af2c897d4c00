"""The inter-stage problem: which stage takes how many layers, and which point of which frontier.

A cell is a frontier of stage i for a number of layers. A solution chooses, for each stage, one cell
and one of its points, so that the layers add up, and the units of devices where they play a role,
and the step time of `mist.plans.schedules` is least.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mist.plans.schedules import fill_time, step_time

Method = Literal["milp", "dp", "both"]
Solver = Literal["milp", "dp"]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cell:
    """The points that `stage` (from 0) may choose when it holds `count` layers on `units` units.

    `first`: index of the first of these layers, or None where all layers are alike. `stable_s` [P],
    seconds, ascending; `lone_s` [P], seconds, descending; none negative: the columns of a
    `mist.pareto.frontier.Frontier`. P may be 0. `spare_s`: seconds of each stable time in which the
    stage need not keep others waiting while the pipeline fills and drains (2 w of
    `mist.plans.schedules`; 0 unless the schedule is zero bubble).

    `units` and `offsets` count where the problem has `num_units`: how many units of devices the
    stage takes, and the units of the cluster, from 0, that it may begin at; None: any. A cell that
    is slower across nodes is given twice, with the offsets of either case.

    `host_bytes` [P]: host memory that each point takes, for problems with `shared` limits. A point
    that is no faster may then be needed because it takes less, so the points may have any order:
    give those that none beats in (stable, lone, host bytes).

    `tie`: how the stage divides weights that it shares with others; chosen cells that have one have
    the same. Points are compared within their cell only, so a slower tie may still win.

    Raises ValueError when something is not so.
    """

    stage: int
    first: int | None
    count: int
    stable_s: Floats
    lone_s: Floats
    spare_s: float = 0.0
    units: int = 1
    offsets: tuple[int, ...] | None = None
    host_bytes: Floats | None = None
    tie: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        fault = _fault_of_place(self) or _fault_of_shapes(self) or _fault_of_times(self)
        if fault is not None:
            raise ValueError(f"cell of stage {self.stage}: {fault}")


def _fault_of_place(cell: Cell) -> str | None:
    """Why no stage has these layers and units; None when one may."""
    if cell.stage < 0 or cell.count < 1 or (cell.first or 0) < 0:
        return f"layers from {cell.first}, count {cell.count}"
    if cell.units < 1 or min(cell.offsets or (0,)) < 0:
        return f"{cell.units} units from {cell.offsets or 'anywhere'}"
    return None


def _fault_of_shapes(cell: Cell) -> str | None:
    """Why these are not columns of numbers; None when they are."""
    columns = [cell.stable_s, cell.lone_s]
    if cell.stable_s.ndim != 1 or cell.stable_s.shape != cell.lone_s.shape:
        return f"{cell.stable_s.shape} and {cell.lone_s.shape} differ"
    if not all(
        times.min(initial=0.0) >= 0.0 and times.max(initial=0.0) < np.inf for times in columns
    ):
        return "times must be finite and not negative"
    host = cell.host_bytes
    if host is not None and (
        host.shape != cell.stable_s.shape or not np.isfinite(host).all() or np.any(host < 0)
    ):
        return "host_bytes must be one finite number for each point, not negative"
    return None


def _fault_of_times(cell: Cell) -> str | None:
    """Why these are not the times of a frontier; None when they are."""
    falls, rises = np.any(np.diff(cell.stable_s) < 0), np.any(np.diff(cell.lone_s) > 0)
    if cell.host_bytes is None and (falls or rises):
        return "stable_s must rise and lone_s fall"
    if not 0.0 <= cell.spare_s <= np.min(cell.stable_s, initial=np.inf):
        return f"spare_s {cell.spare_s} must be within 0 and the least stable_s"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """The chosen points of `stages` may take `limit_bytes` of host memory together."""

    stages: tuple[int, ...]
    limit_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InterStageProblem:
    """`num_layers` layers over `num_stages` stages, for `num_micro_batches` (G) per step.

    `num_chunks`: v, the pieces of a stage's layers that take turns (1: they do not). `num_units`:
    the units of devices that the chosen cells take together, in the order of the stages; None:
    devices play no role, as on uniform meshes. `shared`: limits on the host memory of several
    stages, each of whose cells says its `host_bytes`. The cells of all stages; either all have
    `first` None (layers are alike: only counts matter) or none has (the chosen cells must follow
    each other from layer 0 to `num_layers`). Of one stage all cells have a `tie` or none has.
    Raises ValueError when a size is not positive or a cell lies outside.
    """

    num_layers: int
    num_stages: int
    num_micro_batches: int
    cells: tuple[Cell, ...]
    num_chunks: int = 1
    num_units: int | None = None
    shared: tuple[Shared, ...] = ()

    def __post_init__(self) -> None:
        sizes = (self.num_layers, self.num_stages, self.num_micro_batches, self.num_chunks)
        if min(*sizes, 1 if self.num_units is None else self.num_units) < 1:
            raise ValueError("layers, stages, micro-batches, chunks and units must be at least 1")
        if len({cell.first is None for cell in self.cells}) > 1:
            raise ValueError("either every cell names its first layer, or none does")
        limited = {stage for shared in self.shared for stage in shared.stages}
        if not limited <= set(range(self.num_stages)):
            raise ValueError(f"shared limit of stages {sorted(limited)} of {self.num_stages}")
        self._check_cells(limited)

    def _check_cells(self, limited: set[int]) -> None:
        """Raise ValueError for a cell that lies outside or lacks what its stage needs."""
        for cell in self.cells:
            fault = self._fault_of(cell)
            if fault is not None:
                raise ValueError(fault)
            if cell.stage in limited and cell.host_bytes is None:
                raise ValueError(f"a cell of stage {cell.stage} does not say its host_bytes")
        if {c.stage for c in self.cells if c.tie} & {c.stage for c in self.cells if not c.tie}:
            raise ValueError("of one stage either every cell has a tie, or none has")

    @property
    def ties(self) -> tuple[tuple[int, ...], ...]:
        """The ties of all cells, ascending."""
        return tuple(sorted({cell.tie for cell in self.cells if cell.tie is not None}))

    def _fault_of(self, cell: Cell) -> str | None:
        """Why a cell lies outside; None when it does not."""
        inside = (cell.first or 0) + cell.count <= self.num_layers
        if cell.stage >= self.num_stages or not inside:
            return (
                f"cell (stage {cell.stage}, first {cell.first}, count {cell.count}) is outside "
                f"{self.num_stages} stages, {self.num_layers} layers"
            )
        end = max(cell.offsets or (0,)) + cell.units
        placed = cell.offsets is None if self.num_units is None else end <= self.num_units
        if not placed:
            begins = "anywhere" if cell.offsets is None else cell.offsets
            return (
                f"cell (stage {cell.stage}, {cell.units} units from {begins}) is outside "
                f"{self.num_units or 'no'} units"
            )
        return None

    def fill_s(self, cell: Cell) -> Floats:
        """Seconds [P] that each point adds to filling and draining: (t - w) / v."""
        return fill_time(cell.stable_s, cell.spare_s, chunks=self.num_chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a stage takes: `point` (index into the cell's arrays) of `cell` (index into `cells`)."""

    stage: int
    cell: int
    point: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InterStageSolution:
    """The best choices found, stage by stage, and the proof of how good they are.

    `step_s`: seconds of one step by `mist.plans.schedules.step_time`. `lower_bound_s`: no
    assignment is faster. `num_nodes`: of the branch and bound that gave the bound. `solver`: which
    one found the choices. Nothing here depends on the clock, unless HiGHS is given a time limit:
    the same problem gives the same solution.
    """

    step_s: float
    lower_bound_s: float
    choices: tuple[Choice, ...]
    num_nodes: int
    solver: Solver

    def __post_init__(self) -> None:
        if self.lower_bound_s > self.step_s:
            raise ValueError(f"bound {self.lower_bound_s} s above the step {self.step_s} s")

    @property
    def gap(self) -> float:
        """Share of `step_s` by which an optimum could still be faster; 0 is proven optimal."""
        return (self.step_s - self.lower_bound_s) / abs(self.step_s) if self.step_s else 0.0


def chosen_times(
    problem: InterStageProblem, choices: Sequence[Choice]
) -> tuple[Floats, Floats, Floats]:
    """Stable, lone and fill seconds of the chosen points, each of shape [S], first stage first."""
    chosen = [(problem.cells[choice.cell], choice.point) for choice in choices]
    stable_s = np.array([cell.stable_s[point] for cell, point in chosen])
    lone_s = np.array([cell.lone_s[point] for cell, point in chosen])
    return stable_s, lone_s, np.array([problem.fill_s(cell)[point] for cell, point in chosen])


def chosen_step(problem: InterStageProblem, choices: Sequence[Choice]) -> float:
    """Seconds of one step with these choices."""
    return float(step_time(problem.num_micro_batches, *chosen_times(problem, choices)))


def within_shared(problem: InterStageProblem, choices: Sequence[Choice]) -> bool:
    """Whether these choices, one for each stage in order, keep every shared limit."""
    cells = [(problem.cells[choice.cell].host_bytes, choice.point) for choice in choices]
    host = [0.0 if sizes is None else float(sizes[point]) for sizes, point in cells]
    return all(
        sum(host[stage] for stage in shared.stages) <= shared.limit_bytes
        for shared in problem.shared
    )
