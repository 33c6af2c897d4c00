"""The search space as named columns: groups of layouts and the strategies of their stages.

A group fixes the number of stages S, of micro-batches G, and the schedule; all stages have N / S
devices. Then the samples per micro-step B / G are fixed too, and a strategy is (tp, zero) and the
offload ratios: dp = N / S / tp and the micro-batch B / G / dp follow. Strategies that break a rule
of `mist.rules.combinations` are never generated. Where a schedule needs stages alike in dp and tp,
each tp is a group of its own.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mist.errors import InputError
from mist.pareto.default_partition import dealing_words, dealt_layers
from mist.pareto.unequal_meshes import unequal_sizes
from mist.plans.knobs import KNOBS, SEARCHED_KNOBS
from mist.plans.plan import DEFAULT_SCHEDULE, Schedule
from mist.plans.schedules import DEFAULT_KIND, SCHEDULES, zero_as_run
from mist.plans.search_space import NO_RATIOS, OFFLOADED, SearchSpace
from mist.plans.workload import HeadMode, MemoryLevel, ScheduleKind
from mist.platform import Runtime
from mist.rules.combinations import knob_rules
from mist.rules.levels import (
    broken_by_levels,
    broken_levels,
    head_not_priced,
    may_have,
    not_priced,
)
from mist.rules.rule import Columns, Mask, broken, keeps
from mist.symbolic.columns import strategy_columns
from mist.symbolic.job import Job

HEAD: Final = SEARCHED_KNOBS["head"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Strategies:
    """How a stage may be trained: K rows.

    `columns` [K]: knobs of a stage (`mist.plans.knobs`) and the offload ratio of each state, by
    name. `terms` [K]: what the search formulas need of each; empty until `priced`.
    """

    columns: Mapping[str, NDArray[Any]]
    terms: Mapping[str, Floats] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self["tp"])

    def __getitem__(self, name: str) -> NDArray[Any]:
        """The column of a knob, or of the offload ratio of a state, [K]."""
        return self.columns[name]

    @property
    def knobs(self) -> dict[str, Ints]:
        """The columns of knobs."""
        return {name: self[name] for name in self.columns if name not in OFFLOADED}

    @property
    def offload(self) -> dict[str, Floats]:
        """Offload ratios by state, each [K]."""
        return {name: self[name] for name in OFFLOADED}

    @property
    def num_devices(self) -> Ints:
        """Devices of a stage that is trained so."""
        return np.asarray(self["tp"] * self["dp"])

    def take(self, rows: NDArray[np.bool_] | Ints) -> "Strategies":
        """Some of the rows."""
        columns = {name: column[rows] for name, column in self.columns.items()}
        terms = {name: term[rows] for name, term in self.terms.items()}
        return Strategies(columns=columns, terms=terms)

    def joined(self, *others: "Strategies") -> "Strategies":
        """The rows of all of them, priced or not alike."""
        columns = {
            name: np.concatenate([column, *(other[name] for other in others)])
            for name, column in self.columns.items()
        }
        terms = {
            name: np.concatenate([term, *(other.terms[name] for other in others)])
            for name, term in self.terms.items()
        }
        return Strategies(columns=columns, terms=terms)

    def altered(self, **columns: NDArray[Any]) -> "Strategies":
        """The same with other values in some columns."""
        return replace(self, columns={**self.columns, **columns})

    def priced(
        self, job: Job, num_stages: int, schedule: Schedule = DEFAULT_SCHEDULE
    ) -> "Strategies":
        """The same with their terms, as stages of a pipeline of `num_stages`."""
        strategy = strategy_columns(
            job.placement, self.columns, num_stages=num_stages, schedule=schedule
        )
        return replace(self, terms=job.cost.search_terms_of(strategy))


def all_resident(knobs: Mapping[str, Ints]) -> Strategies:
    """Strategies of these knobs [K] that offload nothing."""
    (count,) = {len(column) for column in knobs.values()}
    return Strategies(columns={**knobs, **dict.fromkeys(OFFLOADED, np.zeros(count))})


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
        dp=space.dp if knobs.data_parallel else (1,),
        pp=space.pp if knobs.schedules else (1,),
        zero=_common(space.zero, knobs.zero_levels),
        levels=_common(space.levels, runtime.levels),
        head=space.head if runtime.converts_layers else _common(space.head, (HeadMode.NONE,)),
        some_layers=space.some_layers and knobs.recomputes_some,
        offload=ratios,
        schedules=_common(space.schedules, knobs.schedules),
        unlike_stages=space.unlike_stages and knobs.unlike_stages,
        unequal_meshes=space.unequal_meshes and knobs.unlike_stages,
    )


def priced(space: SearchSpace, job: Job) -> SearchSpace:
    """A space without the memory levels and heads that a model cannot be converted to.

    Raises InputError where no other is left.
    """
    known = job.platform.runtime.levels
    missing = [level for level in space.levels if level in known and level not in job.levels]
    levels = tuple(level for level in space.levels if level not in missing)
    if not levels:
        raise InputError(" ".join(not_priced(level, job.facts.name) for level in missing))
    heads = _common(space.head, job.heads)
    if not heads and job.platform.runtime.converts_layers:
        raise InputError(" ".join(head_not_priced(mode, job.facts.name) for mode in space.head))
    return replace(space, levels=levels, head=heads or space.head)


def _common(wanted: tuple[T, ...], known: Collection[object]) -> tuple[T, ...]:
    return tuple(value for value in wanted if value in known)


def refuse_unknown(space: SearchSpace, runtime: Runtime) -> None:
    """Raise InputError where a runtime has none of the values that a space allows of a knob."""
    rest: dict[str, ArrayLike] = {
        **{knob.name: knob.least for knob in KNOBS},
        "zero": runtime.knobs.zero_levels[0],
        "schedule": DEFAULT_KIND.value,
        **dict.fromkeys(OFFLOADED, 0.0),
    }
    rules = tuple(knob_rules(runtime))
    messages: list[str] = []
    for column, values in {
        **{knob.name: space.values_of(knob) for knob in SEARCHED_KNOBS.values()},
        "schedule": [kind.value for kind in space.schedules],
    }.items():
        faults = [list(broken(rules, rest | {column: value})) for value in values or ()]
        if faults and all(faults):
            messages += [message for each in faults for message in each]
    faults = [list(broken_levels(runtime, [level])) for level in space.levels]
    if all(faults):
        messages += [message for each in faults for message in each]
    if messages:
        raise InputError(" ".join(messages))


def groups(job: Job, space: SearchSpace) -> Iterator[Group]:
    """Every group with at least one strategy, fewest stages first.

    Raises InputError where the runtime has nothing of what the space allows of a knob.
    """
    refuse_unknown(space, job.platform.runtime)
    space = expressible(space, job.platform.runtime)
    for num_stages, size in _pipelines(job, space):
        yield from _groups(job, space, num_stages, (size,))
    if space.unequal_meshes:
        yield from _unequal_groups(job, space)


def _pipelines(job: Job, space: SearchSpace) -> Iterator[tuple[int, int]]:
    """Numbers of stages, and of devices of a stage."""
    num_gpus = job.platform.num_gpus
    counts = np.array([s for s in divisors(num_gpus) if s <= job.num_layers])
    for num_stages in counts[space.allows("pp", counts)].tolist():
        yield num_stages, num_gpus // num_stages


def _unequal_groups(job: Job, space: SearchSpace) -> Iterator[Group]:
    """Groups whose stages differ in their devices, under 1F1B."""
    num_gpus, per_node = job.platform.num_gpus, job.platform.gpus_per_node
    space = replace(space, schedules=_common(space.schedules, (DEFAULT_KIND,)))
    counts = np.arange(2, min(num_gpus, job.num_layers) + 1)
    for num_stages in counts[space.allows("pp", counts)].tolist():
        sizes = unequal_sizes(num_gpus, num_stages, per_node)
        for group in _groups(job, space, num_stages, sizes) if sizes else ():
            if len(np.unique(group.strategies.num_devices)) > 1:
                yield group


def _groups(
    job: Job, space: SearchSpace, num_stages: int, sizes: tuple[int, ...]
) -> Iterator[Group]:
    """One group for each number of micro-batches and schedule; where stages must be alike, each tp.

    Strategies of all numbers of micro-batches are priced together: numpy's calls take the time.
    """
    counts = divisors(job.workload.global_batch)
    first, *rest = (_strategies(job, space, sizes, count) for count in counts)
    found = first.joined(*rest)
    micro = np.repeat(counts, [len(each) for each in (first, *rest)])
    kept = [
        (schedule, keeps(job.rules, columns) & _have_level(space, columns))
        for schedule in _schedules(job, space, num_stages)
        for columns in [_rule_columns(found, num_stages, micro, schedule)]
    ]
    used = np.logical_or.reduce([rows for _, rows in kept]) if kept else np.zeros(0, dtype=bool)
    if not used.any():
        return
    # One pricing serves all schedules but zero bubble, which may run another ZeRO level.
    priced, held = found.take(used).priced(job, num_stages), []
    for schedule, rows in kept:
        own = priced.take(rows[used])
        if (zero_as_run(schedule.kind, own["zero"]) != own["zero"]).any():
            own = own.priced(job, num_stages, schedule)
        held.append((schedule, own, micro[rows]))
    for count, (schedule, own, its_micro) in product(counts, held):
        for strategies in _by_tp(schedule, own.take(its_micro == count)):
            yield Group(
                num_stages=num_stages,
                num_micro_batches=count,
                sizes=sizes,
                schedule=schedule,
                strategies=strategies,
            )


def _by_tp(schedule: Schedule, strategies: Strategies) -> Iterator[Strategies]:
    """The strategies of a group, or of several where the schedule needs stages alike in tp."""
    if SCHEDULES[schedule.kind].takes_turns:
        for tp in np.unique(strategies["tp"]):
            yield strategies.take(strategies["tp"] == tp)
    elif len(strategies):
        yield strategies


def _schedules(job: Job, space: SearchSpace, num_stages: int) -> Iterator[Schedule]:
    """The schedules of a pipeline; of one stage all are the same.

    GPipe takes as long as 1F1B and holds more: it is looked at only where that may not be used.
    """
    for schedule in _known_schedules(job, space, num_stages):
        dealt = space.unlike_stages or dealt_layers(job, num_stages * schedule.vpp) is not None
        if dealt and num_stages * schedule.vpp <= job.num_layers:
            yield schedule


def _known_schedules(job: Job, space: SearchSpace, num_stages: int) -> Iterator[Schedule]:
    """Schedules of so many stages, with every number of chunks."""
    counts = np.array(space.chunks)
    for kind in _kinds(space) if num_stages > 1 else (DEFAULT_KIND,):
        for chunks in counts[space.allows("chunks", counts)].tolist():
            if SCHEDULES[kind].least_chunks == 1:
                known = chunks == 1
            else:  # chunks of unlike layers would be unlike
                known = chunks > 1 and job.facts.num_kinds == 1
            if known:
                yield Schedule(kind=kind, vpp=chunks)


def _kinds(space: SearchSpace) -> list[ScheduleKind]:
    """Schedules of pipelines under which layers may have a memory level of the space."""
    has_default = DEFAULT_KIND in space.schedules  # as fast as one that holds all, with less
    return [
        kind
        for kind in space.schedules
        if not (has_default and SCHEDULES[kind].holds_all) and levels_under(space, kind)
    ]


def levels_under(space: SearchSpace, kind: ScheduleKind) -> tuple[MemoryLevel, ...]:
    """The memory levels of a space that layers may have under a schedule."""
    return _levels_under(space.levels, kind)


@cache
def _levels_under(levels: tuple[MemoryLevel, ...], kind: ScheduleKind) -> tuple[MemoryLevel, ...]:
    kept: Columns = {"schedule": kind.value, "activations": 0.0, "tp": 1}
    return tuple(level for level in levels if may_have(level, kept))


@cache
def divisors(number: int) -> tuple[int, ...]:
    """Divisors in ascending order: each up to the square root has a partner beyond it."""
    tried = np.arange(1, math.isqrt(number) + 1)
    small = tried[number % tried == 0].tolist()
    return (*small, *(number // d for d in reversed(small) if d * d != number))


def _strategies(
    job: Job, space: SearchSpace, sizes: tuple[int, ...], num_micro_batches: int
) -> Strategies:
    """Every (tp, zero, dp_replicate, head) of stages of these sizes that the space allows."""
    samples = job.workload.global_batch // num_micro_batches
    heads = [HEAD.number_of(mode) for mode in space.head]
    rows = [
        (n, *row)
        for n in sizes
        for row in product(divisors(n), space.zero, _copies(job, space, n), heads)
    ]
    # What is free; the rest follows from it.
    devices, *free, head = np.array(rows, dtype=np.int64).reshape(-1, 5).T
    knobs = dict(zip(("tp", "zero", "dp_replicate"), free, strict=True))
    dp = devices // knobs["tp"]
    micro_batch = samples // dp
    # On one data-parallel rank all ZeRO levels do the same: the lowest stands for them.
    keep = (dp * micro_batch == samples) & (
        (dp > 1) | (knobs["zero"] == min(space.zero, default=0))
    )
    knobs["dp"], knobs["micro_batch"] = dp, micro_batch
    for name, values in knobs.items():
        keep &= space.allows(name, values)
    return all_resident({name: values[keep] for name, values in (knobs | {"head": head}).items()})


def _copies(job: Job, space: SearchSpace, num_devices: int) -> tuple[int, ...]:
    """Copies of the states that a stage may have; if nobody says: none, or one in each node.

    A copy that is smaller than a node shards less than one that fills it, and its collectives are
    as near; one that spans nodes gains little over no copies.
    """
    if space.dp_replicate is not None:
        return space.dp_replicate
    num_nodes = num_devices // job.platform.gpus_per_node
    has_copies = num_nodes > 1 and job.platform.runtime.knobs.copies
    return (1, num_nodes) if has_copies else (1,)


def keeps_rules(job: Job, group: Group, strategies: Strategies) -> NDArray[np.bool_]:
    """Which strategies break no rule in the pipelines of a group."""
    pipeline = (group.num_stages, group.num_micro_batches, group.schedule)
    return keeps(job.rules, _rule_columns(strategies, *pipeline))


def _rule_columns(
    strategies: Strategies, num_stages: int, num_micro_batches: ArrayLike, schedule: Schedule
) -> dict[str, Any]:
    """The columns of the rules, of strategies in a pipeline; micro-batches of each, or of all."""
    return {
        **strategies.columns,
        "num_stages": num_stages,
        "num_micro_batches": num_micro_batches,
        "schedule": schedule.kind.value,
        "chunks": schedule.vpp,
    }


def refusals(job: Job, space: SearchSpace) -> tuple[str, ...]:
    """Why a space has no group: what the strategy breaks that breaks fewest rules.

    Empty where the space has no strategy at all.
    """
    space = expressible(space, job.platform.runtime)
    best: tuple[str, ...] = ()
    counts = divisors(job.workload.global_batch)
    for (num_stages, size), num_micro_batches in product(_pipelines(job, space), counts):
        strategies = _strategies(job, space, (size,), num_micro_batches)
        for schedule in _known_schedules(job, space, num_stages):
            group = Group(
                num_stages=num_stages,
                num_micro_batches=num_micro_batches,
                sizes=(size,),
                schedule=schedule,
                strategies=strategies,
            )
            for found in _broken(job, group, space):
                best = found if not best or len(found) < len(best) else best
    return best or tuple(_without_levels(space))


def _broken(job: Job, group: Group, space: SearchSpace) -> Iterator[tuple[str, ...]]:
    """What the strategy of a group breaks that breaks fewest rules."""
    if not len(group.strategies):
        return
    pipeline = (group.num_stages, group.num_micro_batches, group.schedule)
    columns = _rule_columns(group.strategies, *pipeline)
    has_level = _have_level(space, columns)
    counts = np.sum([~rule.mask(columns) for rule in job.rules], axis=0) + ~has_level
    nearest = group.strategies.take(np.array([np.argmin(counts)]))
    row = {name: column[0] for name, column in nearest.columns.items()}
    columns = _rule_columns(nearest, *pipeline) | row
    messages = list(broken(job.rules, columns))
    if not _have_level(space, columns).all():
        words = dict.fromkeys(broken_by_levels(space.levels, columns))
        messages += [f"{each}." for each in words]
    stages, chunks = group.num_stages, group.schedule.vpp
    if not space.unlike_stages and dealt_layers(job, stages * chunks) is None:
        messages.append(f"{dealing_words(job, stages, chunks)}.")
    yield tuple(messages)


def _have_level(space: SearchSpace, columns: Columns) -> Mask:
    """Strategies whose layers may have a memory level of the space."""
    levels = np.array(space.levels, dtype=np.str_)[:, None]
    return np.asarray(may_have(levels, columns).any(axis=0))


def _without_levels(space: SearchSpace) -> Iterator[str]:
    """Of schedules under which layers may have no memory level of the space: why."""
    for kind in space.schedules:
        if not levels_under(space, kind):
            columns: Columns = {"schedule": kind.value, "activations": 0.0, "tp": 1}
            yield from (f"{words}." for words in set(broken_by_levels(space.levels, columns)))


def with_least_memory(space: SearchSpace) -> SearchSpace:
    """The schedules among which least memory is found: 1F1B, where it may be used, holds least."""
    if DEFAULT_KIND in space.schedules and 1 in space.chunks:
        return replace(space, schedules=(DEFAULT_KIND,), chunks=(1,))
    return space


def with_least_batches(listed: Sequence[Group]) -> list[Group]:
    """Those groups, of like strategies with the smallest micro-batch only, which holds least.

    What a stage keeps, min(stages behind, G) micro-batches of B / (dp G) samples, never falls with
    their size. A step of one micro-batch (G = 1) may hold less, as it adds up no gradients.
    """
    known: set[tuple[object, ...]] = set()
    found: list[Group] = []
    for group in sorted(listed, key=lambda group: -group.num_micro_batches):
        kind = (group.num_stages, group.sizes, group.schedule, group.num_micro_batches == 1)
        columns = [c for name, c in group.strategies.columns.items() if name != "micro_batch"]
        keys = [(*kind, *row) for row in zip(*columns, strict=True)]
        rows = [i for i, key in enumerate(keys) if key not in known]
        known |= set(keys)
        if rows:
            found.append(replace(group, strategies=group.strategies.take(np.array(rows))))
    return found
