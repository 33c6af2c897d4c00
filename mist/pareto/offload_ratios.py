"""Strategies that keep shares of their states and activations in host memory.

A strategy that offloads nothing (`mist.pareto.strategies`) with every tuple of offload ratios that
the space allows, the runtime can express and no rule forbids.

Tuples are many, so groups are first looked at with `MostOffloaded`: one row for each strategy and
share a of activations, which takes as long as with all states on the device, and holds what is left
with as much of each state in host memory as any tuple with this a has. No tuple with the same a is
faster, since copies never shorten a slot (`mist.symbolic.overlap`); none holds less at any instant,
since device bytes fall with each of these ratios

    states - w hosted_w - g hosted_g - o hosted_o,    gradients on the device (1 - g),
    what the optimizer makes (1 - o)

but for the buffers of the optimizer's stream, which are there as soon as anything is offloaded:
the row has none of them. What a micro-batch keeps depends on a alone. So what is impossible for the
row at any number of layers is impossible for all its tuples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mist.pareto.strategies import Floats, Group, Ints, Strategies, expressible, keeps_rules
from mist.plans.schedules import zero_as_run
from mist.plans.search_space import OFFLOADED, SearchSpace
from mist.platform import Runtime
from mist.symbolic.job import Job

_STATES: Final = ("weights", "grads", "optimizer")
_AT_ONCE: Final = 31  # groups that are priced with the one that is asked for
_STREAM: Final = "term_stream_bytes_per_param"


def offloading(
    job: Job, group: Group, space: SearchSpace, rows: Ints, few: Strategies | None = None
) -> Strategies:
    """Strategies `rows` of a group with every tuple of offload ratios but none at all.

    Weights are offloaded only where gradients are. On one data-parallel rank the higher ZeRO levels
    come in, as what streams from the host. `few`: rows of `MostOffloaded`; only tuples that one of
    them stands for.
    """
    space = expressible(space, job.platform.runtime)
    ratios = _tuples(space, job.platform.runtime)
    base = group.strategies.take(rows)
    if not len(ratios) or not len(base):
        return base.take(np.zeros(0, dtype=np.int64))
    every = _every(_with_higher_levels(base, space), ratios)
    return _priced(job, group, every if few is None else every.take(_stood_for(every, few)))


class MostOffloaded:
    """Rows that no tuple of ratios beats: for each strategy and share of activations one.

    Groups with as many stages are priced together, and rows that they share once.
    """

    def __init__(self, job: Job, space: SearchSpace, listed: Sequence[Group]) -> None:
        """`listed`: groups in the order in which they are likely to be asked for."""
        self._job, self._space = job, expressible(space, job.platform.runtime)
        ratios = _tuples(self._space, job.platform.runtime)
        self._ratios = np.concatenate([np.zeros((1, len(OFFLOADED))), ratios])
        self._waiting: dict[int, list[Group]] = {}
        for group in listed:
            self._waiting.setdefault(group.num_stages, []).append(group)
        self._known: dict[Group, Strategies] = {}

    def of(self, group: Group) -> Strategies:
        """The rows of a group, priced; of bytes in host memory they say nothing."""
        if len(self._ratios) == 1:
            return group.strategies
        if group not in self._known:
            waiting = [other for other in self._waiting.get(group.num_stages, ()) if other != group]
            self._waiting[group.num_stages] = waiting[_AT_ONCE:]
            self._price([group, *waiting[:_AT_ONCE]])
        return self._known.pop(group)  # a group is asked for once: its terms are many

    def _price(self, some: Sequence[Group]) -> None:
        """Seconds of resident rows, bytes of hosted ones without the optimizer's stream."""
        pairs = [self._rows(group) for group in some]
        first, *others = (
            rows.altered(zero=zero_as_run(group.schedule.kind, rows["zero"]))
            for group, pair in zip(some, pairs, strict=True)
            for rows in pair
        )
        unlike, at = _unlike(first.joined(*others))
        terms = unlike.priced(self._job, some[0].num_stages).terms
        values = np.stack(list(terms.values()))
        values[[name == _STREAM for name in terms]] = 0.0
        of_time = np.array([name.endswith("_s") for name in terms])[:, None]
        begin = 0
        for group, (resident, _) in zip(some, pairs, strict=True):
            middle, end = begin + len(resident), begin + 2 * len(resident)
            own = np.where(of_time, values[:, at[begin:middle]], values[:, at[middle:end]])
            self._known[group] = replace(resident, terms=dict(zip(terms, own, strict=True)))
            begin = end

    def _rows(self, group: Group) -> tuple[Strategies, Strategies]:
        """Rows with all states on the device, and with as much in host memory as any tuple has."""
        base = _with_higher_levels(group.strategies, self._space)
        kept = keeps_rules(self._job, group, _every(base, self._ratios))
        activations = self._ratios[:, OFFLOADED.index("activations")]
        shares = np.unique(activations)
        possible = kept.reshape(len(base), 1, -1) & (activations == shares[:, None])
        states = self._ratios[:, [OFFLOADED.index(name) for name in _STATES]]
        most = np.where(possible[..., None], states, 0.0).max(axis=2).reshape(-1, len(_STATES))
        rows = np.flatnonzero(possible.any(axis=2))  # k A + a
        resident = Strategies(columns=base.columns).take(rows // len(shares))
        resident = resident.altered(activations=shares[rows % len(shares)])
        hosted = resident.altered(**dict(zip(_STATES, most[rows].T, strict=True)))
        return resident, hosted


def _unlike(strategies: Strategies) -> tuple[Strategies, Ints]:
    """Each row once, not priced, and which of these every row is."""
    columns = strategies.columns
    table, at = np.unique(np.stack(list(columns.values())), axis=1, return_inverse=True)
    unlike = {
        name: row.astype(columns[name].dtype) for name, row in zip(columns, table, strict=True)
    }
    return Strategies(columns=unlike), np.ravel(at)


def _every(base: Strategies, ratios: Floats) -> Strategies:
    """Every strategy with every tuple of ratios [T, 4], not priced."""
    unpriced = Strategies(columns=base.columns)
    many = unpriced.take(np.repeat(np.arange(len(base)), len(ratios)))
    away = np.tile(ratios, (len(base), 1))
    return many.altered(**dict(zip(OFFLOADED, away.T, strict=True)))


def _stood_for(strategies: Strategies, few: Strategies) -> NDArray[np.bool_]:
    """Which strategies have the knobs, and the share of activations, of one of a few, [K]."""
    names = [*few.knobs, "activations"]
    _, at = _unlike(Strategies(columns={n: np.concatenate([few[n], strategies[n]]) for n in names}))
    return np.isin(at[len(few) :], at[: len(few)])


def with_ratios(job: Job, group: Group, base: Strategies, ratios: Floats) -> Strategies:
    """Every strategy with every tuple of offload ratios [T, 4] that breaks no rule, priced."""
    return _priced(job, group, _every(base, ratios))


def _priced(job: Job, group: Group, strategies: Strategies) -> Strategies:
    """Those that break no rule, priced."""
    kept = strategies.take(keeps_rules(job, group, strategies))
    return kept.priced(job, group.num_stages, group.schedule)


def whole_layers(ratio: ArrayLike, count: ArrayLike) -> Floats:
    """Of `count` layers the least whole number that is a share of at least `ratio`."""
    # The slack keeps a product such as 7.000000000000001 from becoming 8 layers.
    return np.asarray(np.ceil(np.asarray(ratio) * np.asarray(count) - 1e-9))


def within_caps(
    space: SearchSpace, runtime: Runtime, strategies: Strategies, count: Ints
) -> NDArray[np.bool_]:
    """Where shares that plans round up to whole layers stay within their limits, [K, R].

    `count` [R]: layers of a stage.
    """
    kept = np.ones((len(strategies), len(count)), dtype=np.bool_)
    by_layer = runtime.offload is not None and runtime.offload.by_layer
    for name in ("weights", "grads") if by_layer else ():
        most = space.most.get(name, 1.0)
        if most < 1.0:
            layers = whole_layers(strategies.offload[name][:, None], count)
            kept &= layers <= most * count * (1 + 1e-9)
    return kept


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
    alone = base.take(base["dp"] == 1)
    for zero in space.zero:
        if len(alone) and zero != alone["zero"][0]:
            higher = alone.altered(zero=np.full_like(alone["zero"], zero))
            base = base.joined(higher)
    return base
