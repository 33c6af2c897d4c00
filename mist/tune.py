"""The method on one screen: search parallelism, memory and layers together, and prove the answer.

For every group (S stages, G micro-batches), most promising first:

1. bound     no plan of the group is faster than (G - 1) T / S + T, T the least time of all layers;
             a group whose bound is not below the best plan is pruned;
2. enumerate every strategy x position x layer range, with the fewest recomputed layers that fit
             (mist.pareto.table), and the even layouts among them (mist.pareto.split);
3. frontier  per position and range, the strategies that none beats in (stable, lone);
4. join      one point per stage, by the exact dynamic program (mist.milp).

The winner is confirmed by the mixed-integer program through PuLP and HiGHS, which gives its gap.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mist.errors import Infeasible, InputError
from mist.estimate import Job
from mist.milp import Cell, InterStageProblem, InterStageSolution, solve
from mist.pareto.frontier import Frontier, frontier
from mist.pareto.space import Group, groups
from mist.pareto.split import even_split
from mist.pareto.table import Floats, StageTable, stage_table
from mist.plans import MemoryLevel, Offload, StagePlan
from mist.schedule import step_time
from mist.spec import SearchSpace

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageChoice:
    """What one stage does: layers [first, count], the group's strategy, recomputed layers."""

    first: int
    count: int
    strategy: int
    num_full: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A pipeline of one group, its predicted step time and the peak of its fullest device."""

    group: Group
    stages: tuple[StageChoice, ...]
    step_s: float
    peak_bytes: float

    @property
    def kind(self) -> tuple[int, int, int]:
        """What tells layouts apart for a reader: pp, and tp and ZeRO of the first stage."""
        strategy = self.stages[0].strategy
        return len(self.stages), int(self.group.tp[strategy]), int(self.group.zero[strategy])


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The fastest layout, the proof, other kinds of layout by step time, and what was searched."""

    best: Layout
    lower_bound_s: float
    gap: float
    others: tuple[Layout, ...]
    statistics: dict[str, int]


@dataclass(slots=True, kw_only=True)
class _Search:
    """Best layout so far, the best of each kind, and counts."""

    job: Job
    space: SearchSpace
    limit_bytes: float
    num_alternatives: int
    best: Layout | None = None
    by_kind: dict[tuple[int, int, int], Layout] = field(default_factory=dict)
    num_groups: int = 0
    num_pruned: int = 0
    num_stages: int = 0
    num_solved: int = 0

    @property
    def upper_bound_s(self) -> float:
        return self.best.step_s if self.best else math.inf

    @property
    def horizon_s(self) -> float:
        """Step time beyond which a group can neither win nor be among the alternatives."""
        steps = sorted(layout.step_s for layout in self.by_kind.values())
        return steps[self.num_alternatives] if len(steps) > self.num_alternatives else math.inf

    def offer(self, layout: Layout) -> None:
        """Keep a layout if it is the best, or the best of its kind."""
        if layout.step_s < self.upper_bound_s:
            self.best = layout
        known = self.by_kind.get(layout.kind)
        if known is None or layout.step_s < known.step_s:
            self.by_kind[layout.kind] = layout


def tune(
    job: Job,
    space: SearchSpace,
    *,
    limit_bytes: float,
    num_alternatives: int,
    progress: Progress,
) -> Tuned:
    """Find the fastest layout whose every stage stays within `limit_bytes`.

    Raises Infeasible when no layout does.
    """
    search = _Search(
        job=job, space=space, limit_bytes=limit_bytes, num_alternatives=num_alternatives
    )
    bounded = sorted(
        ((_lower_bound(job, group), group) for group in groups(job, space)),
        key=lambda row: (row[0], row[1].num_stages, row[1].num_micro_batches),
    )
    for done, (bound_s, group) in enumerate(bounded):
        search.num_groups += 1
        if bound_s >= max(search.upper_bound_s, search.horizon_s):
            search.num_pruned += 1
            continue
        _search_group(search, group, bound_s)
        found = f"best {search.best.step_s:.4g} s per step" if search.best else "nothing fits yet"
        progress(f"group {done + 1} of {len(bounded)}: {found}")
    if not bounded:
        raise InputError(_no_group_words(job, space))
    if search.best is None:
        raise Infeasible(f"{job.facts.name} does not fit.")
    return _prove(search, search.best)


def _lower_bound(job: Job, group: Group) -> float:
    """(G - 1) T / S + T: the slowest stage takes at least T / S, a lone micro-batch all of T."""
    terms = group.columns(job)
    layers = sum(
        job.kind_prefix[kind, -1] * terms[f"term_{kind}_eager_stable_s"].min()
        for kind in range(job.facts.num_kinds)
    )
    ends = sum(terms[f"term_{end}_eager_stable_s"].min() for end in ("embed", "head"))
    total_s = float(layers + ends)
    return (group.num_micro_batches - 1) * total_s / group.num_stages + total_s


def _search_group(search: _Search, group: Group, bound_s: float) -> None:
    """Even layouts first, as the bound; then the best mix of stages."""
    table = stage_table(search.job, group, search.space, search.limit_bytes)
    search.num_stages += table.feasible.size
    for layout in _even_layouts(table):
        search.offer(layout)
    if bound_s < search.upper_bound_s:
        search.num_solved += 1
        joined = _join(table, search.job.num_layers, search.upper_bound_s, confirm=False)
        if joined is not None:
            search.offer(joined[0])


def _even_layouts(table: StageTable, value: Floats | None = None) -> Iterator[Layout]:
    """For each strategy the layout that uses it in every stage, split so that the worst is best.

    The worst stage is the slowest that fits; or the one with the largest `value` [K, S, R], whether
    it fits or not.
    """
    if value is None:
        value = np.where(table.feasible, table.stable_s, np.inf)
    chosen = even_split(table, value)
    position = np.arange(table.group.num_stages)
    for strategy in np.flatnonzero(chosen[:, 0] >= 0):
        at = (strategy, position, chosen[strategy])
        step_s = step_time(table.group.num_micro_batches, table.stable_s[at], table.lone_s[at])
        rows = [(int(row), int(strategy)) for row in chosen[strategy]]
        yield _layout(table, rows, float(step_s))


def _join(
    table: StageTable, num_layers: int, upper_bound_s: float, *, confirm: bool
) -> tuple[Layout, InterStageSolution] | None:
    """The best mix of stages that beats the bound, from the frontiers of every stage."""
    points = dict(_frontiers(table, upper_bound_s))
    keys = tuple(points)
    cells = tuple(
        Cell(
            stage=stage,
            first=None if table.alike else int(table.first[row]),
            count=int(table.count[row]),
            stable_s=point.stable_s,
            lone_s=point.lone_s,
        )
        for (stage, row), point in points.items()
    )
    problem = InterStageProblem(
        num_layers=num_layers,
        num_stages=table.group.num_stages,
        num_micro_batches=table.group.num_micro_batches,
        cells=cells,
    )
    solution = solve(problem, method="both" if confirm else "dp")
    if solution is None:
        return None
    chosen = [(keys[choice.cell], choice.point) for choice in solution.choices]
    rows = [(key[1], int(points[key].choice[point])) for key, point in chosen]
    return _layout(table, rows, solution.step_s), solution


def _frontiers(
    table: StageTable, upper_bound_s: float
) -> Iterator[tuple[tuple[int, int], Frontier]]:
    """Non-empty frontiers by (stage, range), without the points that alone exceed the bound."""
    stable_s, lone_s = (
        np.where(table.feasible, times, 0.0) for times in (table.stable_s, table.lone_s)
    )
    least_s = (table.group.num_micro_batches - 1) * stable_s + lone_s
    useful = table.feasible & (least_s <= upper_bound_s)
    for stage, row in np.argwhere(useful.any(axis=0)):
        at = (slice(None), stage, row)
        yield (
            (int(stage), int(row)),
            frontier(table.stable_s[at], table.lone_s[at], table.peak_bytes[at], useful[at]),
        )


def _layout(table: StageTable, rows: Sequence[tuple[int, int]], step_s: float) -> Layout:
    """Stages in order from (range, strategy) rows: each starts where the one before ends."""
    stages, first, peaks = [], 0, []
    for position, (row, strategy) in enumerate(rows):
        at = (strategy, position, row)
        count = int(table.count[row])
        stages.append(
            StageChoice(
                first=first, count=count, strategy=strategy, num_full=int(table.num_full[at])
            )
        )
        first += count
        peaks.append(float(table.peak_bytes[at]))
    return Layout(group=table.group, stages=tuple(stages), step_s=step_s, peak_bytes=max(peaks))


def _prove(search: _Search, best: Layout) -> Tuned:
    """Confirm the winner's group with the mixed-integer program; pruned groups cannot beat it."""
    table = stage_table(search.job, best.group, search.space, search.limit_bytes)
    slack = 1.0 + 1e-9  # the bound is the winner itself: rounding must not cut it off
    joined = _join(table, search.job.num_layers, best.step_s * slack, confirm=True)
    assert joined is not None, "the winner vanished from its own group"
    layout, solution = joined
    others = sorted(
        (other for kind, other in search.by_kind.items() if kind != layout.kind),
        key=lambda other: other.step_s,
    )
    return Tuned(
        best=layout,
        lower_bound_s=solution.lower_bound_s,
        gap=solution.gap,
        others=tuple(others[: search.num_alternatives]),
        statistics={
            "groups": search.num_groups,
            "groups_pruned": search.num_pruned,
            "groups_solved": search.num_solved,
            "stages_evaluated": search.num_stages,
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One layout as the plot shows it."""

    step_s: float
    peak_bytes: float


def landscape(
    job: Job, space: SearchSpace, *, limit_bytes: float, within_s: float
) -> Iterator[Point]:
    """Even layouts without, with just enough and with full recomputation, as far as `within_s`."""
    for group in groups(job, space):
        if _lower_bound(job, group) > within_s:
            continue
        for checkpoint in ("none", "any", "full"):
            allowed = replace(space, checkpoint=checkpoint)
            table = stage_table(job, group, allowed, limit_bytes)
            for layout in _even_layouts(table, table.stable_s):
                if layout.step_s <= within_s:
                    yield Point(step_s=layout.step_s, peak_bytes=layout.peak_bytes)


def smallest_peak(job: Job, space: SearchSpace) -> Layout:
    """The layout whose fullest device holds least. Raises InputError when the space is empty."""
    checkpoint = "none" if space.checkpoint == "none" else "full"
    layouts: list[Layout] = []
    for group in groups(job, space):
        table = stage_table(job, group, replace(space, checkpoint=checkpoint), math.inf)
        layouts += _even_layouts(table, value=table.peak_bytes)
    if not layouts:
        raise InputError(_no_group_words(job, space))
    return min(layouts, key=lambda layout: (layout.peak_bytes, layout.step_s))


def _no_group_words(job: Job, space: SearchSpace) -> str:
    """Why the space is empty: the rules that a restriction breaks, or the global batch."""
    for tp in space.tp or ():
        messages = [
            rule.message.format(tp=tp)
            for rule in job.rules
            if rule.name.startswith("tp-") and not rule.mask({"tp": tp}).all()
        ]
        if messages:
            return " ".join(messages)
    batch, num_gpus = job.workload.global_batch, job.platform.num_gpus
    restricted = f" with {', '.join(space.restrictions)}" if space.restrictions else ""
    if batch % num_gpus:
        advice = f"Try --global-batch {-(-batch // num_gpus) * num_gpus}."
    else:
        advice = "Restrict less, or let the restricted sizes divide it."
    return (
        f"--global-batch {batch}: no (dp, micro-batch, micro-batches) factorises it on {num_gpus} "
        f"GPUs{restricted}. {advice}"
    )


def stage_plans(job: Job, layout: Layout) -> tuple[StagePlan, ...]:
    """The stages of a layout as a plan writes them, devices in pipeline order."""
    group = layout.group
    return tuple(
        StagePlan(
            layers=((stage.first, stage.count),),
            devices=(position * group.num_devices, group.num_devices),
            dp=int(group.dp[stage.strategy]),
            tp=int(group.tp[stage.strategy]),
            sp=bool(group.tp[stage.strategy] > 1 and job.platform.runtime.knobs.sequence_parallel),
            cp=1,
            ep=1,
            micro_batch=int(group.micro_batch[stage.strategy]),
            zero=int(group.zero[stage.strategy]),  # type: ignore[arg-type]
            head="eager",
            memory={
                MemoryLevel.EAGER: stage.count - stage.num_full,
                MemoryLevel.FULL: stage.num_full,
            },
            offload=Offload(),
        )
        for position, stage in enumerate(layout.stages)
    )
