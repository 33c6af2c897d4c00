"""The search space as named columns: groups of layouts and the strategies of their stages.

A group fixes the number of stages S, of micro-batches G, and the schedule; all stages have N / S
devices. Then the samples per micro-step B / G are fixed too, and a strategy is (tp, zero) and the
offload ratios: dp = N / S / tp and the micro-batch B / G / dp follow. Strategies that break a rule
of `mist.rules` are never generated. Where a schedule needs stages alike in dp and tp, each tp is a
group of its own.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from mist.estimate import Job, strategy_columns
from mist.pareto.meshes import unequal_sizes
from mist.plans import ONE_F_ONE_B, Schedule
from mist.platform import Runtime
from mist.schedule import zero_as_run
from mist.spaces import NO_RATIOS, OFFLOADED, SearchSpace
from mist.spec import MemoryLevel, ScheduleKind

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
T = TypeVar("T")

# Schedules that run chunks in turn, or split the backward pass, connect each stage's ranks one to
# one: stages have the same dp and tp (torch.distributed.pipelining).
ALIKE_MESHES: Final = (ScheduleKind.INTERLEAVED, ScheduleKind.ZERO_BUBBLE)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Strategies:
    """How a stage may be trained: K rows. `weights` ... `activations`: offload ratios.

    `terms` [K]: what the search formulas need of each; empty until `priced`.
    """

    tp: Ints
    dp: Ints
    micro_batch: Ints
    zero: Ints
    weights: Floats
    grads: Floats
    optimizer: Floats
    activations: Floats
    terms: Mapping[str, Floats] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tp)

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """The knobs by name, each [K]."""
        return {item.name: getattr(self, item.name) for item in fields(self)[:-1]}

    @property
    def offload(self) -> dict[str, Floats]:
        """Offload ratios by state, each [K]."""
        return {name: getattr(self, name) for name in OFFLOADED}

    def take(self, rows: NDArray[np.bool_] | Ints) -> "Strategies":
        """Some of the rows."""
        columns = {name: column[rows] for name, column in self.columns.items()}
        terms = {name: term[rows] for name, term in self.terms.items()}
        return Strategies(**columns, terms=terms)

    def joined(self, other: "Strategies") -> "Strategies":
        """The rows of both, priced or not alike."""
        columns = {
            name: np.concatenate([column, getattr(other, name)])
            for name, column in self.columns.items()
        }
        terms = {n: np.concatenate([term, other.terms[n]]) for n, term in self.terms.items()}
        return Strategies(**columns, terms=terms)

    def priced(self, job: Job, num_stages: int, schedule: Schedule = ONE_F_ONE_B) -> "Strategies":
        """The same with their terms, as stages of a pipeline of `num_stages`."""
        strategy = strategy_columns(
            job,
            num_stages=num_stages,
            dp=self.dp,
            tp=self.tp,
            micro_batch=self.micro_batch,
            zero=self.zero,
            offload=self.offload,
            schedule=schedule,
        )
        return replace(self, terms=job.cost.search_terms_of(strategy))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """S stages, G micro-batches, a schedule; what stages may do without offloading, priced.

    `sizes`: devices that a stage may have, ascending; one, or stages may differ.
    """

    num_stages: int
    num_micro_batches: int
    sizes: tuple[int, ...]
    schedule: Schedule
    strategies: Strategies


def expressible(space: SearchSpace, runtime: Runtime) -> SearchSpace:
    """What of a space a runtime can express."""
    knobs = runtime.knobs
    ratios = {n: space.offload[n] if runtime.offloads(n) else NO_RATIOS[n] for n in OFFLOADED}
    return replace(
        space,
        tp=space.tp if knobs.tensor_parallel else (1,),
        pp=space.pp if knobs.schedules else (1,),
        zero=_common(space.zero, knobs.zero_levels),
        levels=tuple(level for level in space.levels if _has_level(level, runtime)),
        some_layers=space.some_layers and knobs.recomputes_some,
        offload=ratios,
        schedules=_common(space.schedules, knobs.schedules),
        unlike_stages=space.unlike_stages and knobs.unlike_stages,
        unequal_meshes=space.unequal_meshes and knobs.unlike_stages,
    )


def _common(wanted: tuple[T, ...], known: Collection[object]) -> tuple[T, ...]:
    return tuple(value for value in wanted if value in known)


def _has_level(level: MemoryLevel, runtime: Runtime) -> bool:
    return level is not MemoryLevel.SELECTIVE or runtime.selective is not None


def groups(job: Job, space: SearchSpace) -> Iterator[Group]:
    """Every group with at least one strategy, fewest stages first."""
    space = expressible(space, job.platform.runtime)
    num_gpus, batch = job.platform.num_gpus, job.workload.global_batch
    counts = np.array([s for s in divisors(num_gpus) if s <= job.num_layers])
    for num_stages in counts[space.allows("pp", counts)].tolist():
        for num_micro_batches in divisors(batch):
            yield from _groups(job, space, num_stages, num_micro_batches, (num_gpus // num_stages,))
    if space.unequal_meshes:
        yield from _unequal_groups(job, space)


def _unequal_groups(job: Job, space: SearchSpace) -> Iterator[Group]:
    """Groups whose stages differ in their devices, under 1F1B."""
    num_gpus, per_node = job.platform.num_gpus, job.platform.gpus_per_node
    space = replace(space, schedules=_common(space.schedules, (ScheduleKind.ONE_F_ONE_B,)))
    counts = np.arange(2, min(num_gpus, job.num_layers) + 1)
    for num_stages in counts[space.allows("pp", counts)].tolist():
        sizes = unequal_sizes(num_gpus, num_stages, per_node)
        for num_micro_batches in divisors(job.workload.global_batch) if sizes else ():
            for group in _groups(job, space, num_stages, num_micro_batches, sizes):
                strategies = group.strategies
                if len(np.unique(strategies.tp * strategies.dp)) > 1:
                    yield group


def _groups(
    job: Job, space: SearchSpace, num_stages: int, num_micro_batches: int, sizes: tuple[int, ...]
) -> Iterator[Group]:
    """One group for each schedule, and where stages must be alike for each tp."""
    found = _strategies(job, space, sizes, num_micro_batches)
    group = partial(
        Group,
        num_stages=num_stages,
        num_micro_batches=num_micro_batches,
        sizes=sizes,
    )
    kept = [
        (schedule, _keeps_rules(job, group(schedule=schedule, strategies=found), found))
        for schedule in _schedules(job, space, num_stages)
    ]
    used = np.logical_or.reduce([rows for _, rows in kept]) if kept else np.zeros(0, dtype=bool)
    if not used.any():
        return
    priced = found.take(used).priced(job, num_stages)
    for schedule, rows in kept:
        held = priced.take(rows[used])
        if (zero_as_run(schedule.kind, held.zero) != held.zero).any():
            held = held.priced(job, num_stages, schedule)
        if schedule.kind in ALIKE_MESHES:
            for tp in np.unique(held.tp):
                yield group(schedule=schedule, strategies=held.take(held.tp == tp))
        elif len(held):
            yield group(schedule=schedule, strategies=held)


def _schedules(job: Job, space: SearchSpace, num_stages: int) -> Iterator[Schedule]:
    """The schedules of a pipeline; of one stage all are the same.

    GPipe takes as long as 1F1B and holds more: it is looked at only where that may not be used.
    """
    if num_stages == 1:
        yield ONE_F_ONE_B
        return
    for kind in filter(partial(levels_under, space), space.schedules):
        if kind is ScheduleKind.GPIPE and ScheduleKind.ONE_F_ONE_B in space.schedules:
            continue
        if kind is not ScheduleKind.INTERLEAVED:
            yield Schedule(kind=kind, vpp=1)
        elif job.facts.num_kinds == 1:  # chunks of unlike layers would be unlike
            for chunks in space.chunks:
                if chunks > 1 and chunks * num_stages <= job.num_layers:
                    yield Schedule(kind=kind, vpp=chunks)


def levels_under(space: SearchSpace, kind: ScheduleKind) -> tuple[MemoryLevel, ...]:
    """The memory levels of a space that layers may have under a schedule."""
    split = kind is ScheduleKind.ZERO_BUBBLE
    return tuple(each for each in space.levels if each is MemoryLevel.EAGER or not split)


def divisors(number: int) -> list[int]:
    """Divisors in ascending order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _strategies(
    job: Job, space: SearchSpace, sizes: tuple[int, ...], num_micro_batches: int
) -> Strategies:
    """Every (tp, zero) of stages of these sizes that the space allows, nothing offloaded."""
    samples = job.workload.global_batch // num_micro_batches
    rows = [(n, tp, z) for n in sizes for tp in divisors(n) for z in space.zero]
    devices, tp, zero = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    dp = devices // tp
    micro_batch = samples // dp
    keep = (dp * micro_batch == samples) & ((dp > 1) | (zero == min(space.zero, default=0)))
    for name, values in (("tp", tp), ("dp", dp), ("micro_batch", micro_batch)):
        keep &= space.allows(name, values)
    none = np.zeros(int(keep.sum()))
    return Strategies(
        tp=tp[keep],
        dp=dp[keep],
        micro_batch=micro_batch[keep],
        zero=zero[keep],
        weights=none,
        grads=none,
        optimizer=none,
        activations=none,
    )


def _keeps_rules(job: Job, group: Group, strategies: Strategies) -> NDArray[np.bool_]:
    """Which strategies break no rule in the pipelines of a group."""
    columns = strategies.columns | {
        "dp_replicate": 1,
        "num_stages": group.num_stages,
        "num_micro_batches": group.num_micro_batches,
        "schedule": group.schedule.kind.value,
        "chunks": group.schedule.vpp,
    }
    kept = np.ones(len(strategies), dtype=np.bool_)
    for rule in job.rules:
        kept &= rule.mask(columns)
    return kept


def offloading(job: Job, group: Group, space: SearchSpace, rows: Ints) -> Strategies:
    """Strategies `rows` of a group with every tuple of offload ratios but none at all.

    Weights are offloaded only where gradients are. On one data-parallel rank the higher ZeRO levels
    come in, as what streams from the host.
    """
    space = expressible(space, job.platform.runtime)
    ratios = _tuples(space, job.platform.runtime)
    base = group.strategies.take(rows)
    if not len(ratios) or not len(base):
        return base.take(np.zeros(0, dtype=np.int64))
    return with_ratios(job, group, _with_higher_levels(base, space), ratios)


def with_ratios(job: Job, group: Group, base: Strategies, ratios: Floats) -> Strategies:
    """Every strategy with every tuple of offload ratios [T, 4] that breaks no rule, priced."""
    many = base.take(np.repeat(np.arange(len(base)), len(ratios)))
    away = np.tile(ratios, (len(base), 1))
    strategies = replace(many, **dict(zip(OFFLOADED, away.T, strict=True)))
    kept = strategies.take(_keeps_rules(job, group, strategies))
    return kept.priced(job, group.num_stages, group.schedule)


def lean_ratios(space: SearchSpace) -> Mapping[str, tuple[float, ...]]:
    """The offload ratios among which least memory is found, where host memory does not bind.

    Memory falls with the share of a state. That of activations staged on their way grows with the
    share, which may be more than it saves at the end of a backward pass: all of these are tried.
    """
    return {
        name: ratios if name == "activations" else tuple(sorted({min(ratios), max(ratios)}))
        for name, ratios in space.offload.items()
    }


def _tuples(space: SearchSpace, runtime: Runtime) -> Floats:
    """Offload ratios [T, 4] of what the space allows, without the tuple of nothing."""
    axes = np.meshgrid(*(space.offload[name] for name in OFFLOADED), indexing="ij")
    rows = np.stack([axis.ravel() for axis in axes], axis=-1)
    weights, grads = rows[:, 0], rows[:, 1]
    by_layer = runtime.offload is not None and runtime.offload.by_layer
    alone = not runtime.offloads("grads")
    kept = weights == grads if by_layer else (weights == 0) | (grads > 0) | alone
    return np.asarray(rows[kept & (rows > 0).any(axis=1)])


def _with_higher_levels(base: Strategies, space: SearchSpace) -> Strategies:
    """On one data-parallel rank every ZeRO level is generated: streaming tells them apart."""
    alone = base.take(base.dp == 1)
    for zero in space.zero:
        if len(alone) and zero != alone.zero[0]:
            higher = replace(alone, zero=np.full_like(alone.zero, zero))
            base = base.joined(higher)
    return base
