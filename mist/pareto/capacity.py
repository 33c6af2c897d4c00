"""The most layers that a stage can hold and still be part of a plan that is fast enough.

A stage with t, u, and at every instant m bytes is part of a plan of step T or less only if, with F
the least stable time of the layers of the other stages, v chunks and M bytes of memory,

    (G - 1) t + u <= T,    (G - 1) t + (t + F) / v <= T,    m <= M                             (*)

(zero bubble: without the second). The first holds because what stages behind add to filling is not
negative, the second because a lone micro-batch passes through all stages. All of them are lines in
the numbers n_x of layers at each level (`mist.pareto.linear_cost`), so each reads

    c_0 + sum_x n_x c_x <= T,    m_0 + sum_x n_x m_x <= M.

Numbers need not be whole for what follows: the time saved by recomputing one byte less is that of
the edge of the convex envelope on which a fractional knapsack of layers ends. Adding mu >= 0 times
the second line to the first, with y the layers and r = min_x (c_x + mu m_x),

    y r <= sum_x n_x (c_x + mu m_x) <= T - c_0 + mu (M - m_0).

Any mu is valid, that at which two levels cost the same is the envelope's, 0 and infinity are the
two lines alone; the least y over mu and over the pairs of lines bounds the layers of the stage, and
the largest over the strategies and mixes of levels those of the position. Layers of unlike kinds
count by weight, in seconds of the fastest strategy. A stage has at least one layer at each level of
a mix, so c_0 and m_0 are those of the mix; of several kinds each level has one kind at least, and
what a stage has more of only adds to both.

Every plan gives all layers to its positions, so where these capacities do not add up to the layers
of the model, no plan is fast enough; where they hardly do, each position needs what the others
cannot take. Nothing is said about host memory: what equal shares keep out must stay in sight.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mist.pareto.bounds import fastest_layers
from mist.pareto.candidates import GroupModel
from mist.pareto.layer_ranges import Ranges, kinds_of
from mist.pareto.linear_cost import LEVELS, Held, StageLines, instants
from mist.pareto.strategies import Floats
from mist.plans.plan import Limits
from mist.plans.workload import MemoryLevel, ScheduleKind

_SLACK: Final = 1e-9  # above the rounding of the sums that are compared


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Capacity:
    """What each position can take in a plan that is fast enough.

    `most` [S, K]: load of a stage under each strategy, -inf where it has none. `total`: load of all
    layers; `load` [R]: of each range.
    """

    most: Floats
    total: float
    load: Floats

    @property
    def suffices(self) -> bool:
        """Whether the positions can take all layers, each under the strategy that suits it best."""
        most = self.most.max(axis=1, initial=-np.inf)
        return bool(most.sum() >= self.total)

    @property
    def alone(self) -> NDArray[np.bool_]:
        """Strategies [K] under which all positions together can take all layers."""
        return np.asarray(self.most.sum(axis=0) >= self.total)

    @property
    def least(self) -> Floats:
        """The load that the other positions leave to each of them, [S]."""
        most = self.most.max(axis=1, initial=-np.inf)
        return np.asarray(self.total - (most.sum() - most))

    @property
    def useful(self) -> NDArray[np.bool_]:
        """Strategies [K] under which some position can take what the others leave to it."""
        enough = self.most >= np.maximum(self.least, 0.0)[:, None]
        return np.asarray(enough.any(axis=0))

    @property
    def placeable(self) -> NDArray[np.bool_]:
        """Ranges that a position can take and that leave no more than the others can, [S, R]."""
        most = self.most.max(axis=1, initial=-np.inf)
        return np.asarray((self.load <= most[:, None]) & (self.load >= self.least[:, None]))


def capacity(
    model: GroupModel, ranges: Ranges, limits: Limits, step_s: float, *, coarse: bool = False
) -> Capacity:
    """What the positions of a group can take in a plan no slower than `step_s`.

    `coarse`: positions that differ in their micro-batches in flight are taken for the one of them
    that holds fewest, which can take most.
    """
    layers, fastest_s = model.job.kind_prefix[:, -1], fastest_layers(model)
    weight = fastest_s if len(layers) > 1 else np.ones(1)
    load = weight @ kinds_of(model.job, ranges)
    most = np.full((model.group.num_stages, len(model.strategies)), -np.inf)
    for stages, held in model.together(len(model.strategies), ranges):
        knapsack = _Knapsack(
            model=model,
            lines=model.lines(int(stages[0])),
            held=_least(held, coarse=coarse),
            weight=weight,
            filled_s=fastest_s,
        )
        found = knapsack.most(limits.device_bytes, step_s * (1 + _SLACK))
        for index, in_flight in enumerate(held.in_flight.tolist()):
            own = [stage for stage in stages if model.in_flight(stage) == in_flight]
            most[own] = found[0 if coarse else index]
    if len(layers) == 1:
        most = np.floor(most * (1 + _SLACK))
    most = np.minimum(most, load.max(initial=-np.inf))
    most[most < load.min(initial=np.inf) * (1 - _SLACK)] = -np.inf
    return Capacity(
        most=most, total=float(weight @ layers) * (1 - _SLACK), load=load * (1 - _SLACK)
    )


def _least(held: Held, *, coarse: bool) -> Held:
    """The least that an average layer holds in any range, [F, 1]; of the first position only."""
    more = held.layers_more.min(axis=1, keepdims=True)
    if not coarse:
        return replace(held, layers_more=more)
    return Held(in_flight=held.in_flight[:1], layers_more=more.min(keepdims=True))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Line:
    """c_0 [P] and c_x [X, P] per load of each kind and level of a mix, and what it may come to."""

    base: Floats
    rates: Floats
    limit: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Knapsack:
    """The stages of one kind of position: K strategies for each of F micro-batches in flight.

    `weight` [Q]: load of a layer of each kind; `filled_s` [Q]: seconds of one under the fastest
    strategy.
    """

    model: GroupModel
    lines: StageLines
    held: Held
    weight: Floats
    filled_s: Floats

    def most(self, device_bytes: float, step_s: float) -> Floats:
        """The load, [F, K]."""
        size = len(self.held.in_flight) * len(self.model.strategies)
        most = np.full(size, -np.inf)
        for levels in [*((level,) for level in self.model.space.levels), *self.model.pairs]:
            bytes_ = list(self._bytes(levels, device_bytes))
            own = np.full(size, np.inf)
            for times in self._times(levels, step_s):
                own = np.minimum(own, _alone(times))
                for each in bytes_:
                    own = np.minimum(own, _both(times, each))
            for each in bytes_:
                own = np.minimum(own, _alone(each))
            most = np.maximum(most, own)
        return most.reshape(len(self.held.in_flight), -1)

    def _bytes(self, levels: Sequence[MemoryLevel], device_bytes: float) -> Iterator[_Line]:
        if np.isfinite(device_bytes):
            for name in instants(self.model.job.platform.runtime):
                base, rates = self._output(name, levels)
                yield _Line(base=base, rates=rates / self._each(levels), limit=device_bytes)

    def _times(self, levels: Sequence[MemoryLevel], step_s: float) -> Iterator[_Line]:
        group, all_layers = self.model.group, self.model.job.kind_prefix[:, -1]
        rounds, chunks = group.num_micro_batches - 1, group.schedule.vpp
        stable_s, stable_rates = self._output("stable_s", levels)
        lone_s, lone_rates = self._output("lone_s", levels)
        each = self._each(levels)
        yield _Line(
            base=rounds * stable_s + lone_s,
            rates=(rounds * stable_rates + lone_rates) / each,
            limit=step_s,
        )
        if group.schedule.kind is not ScheduleKind.ZERO_BUBBLE:
            filled_s = np.tile(self.filled_s, len(levels))[:, None]
            share = rounds + 1 / chunks
            yield _Line(
                base=share * stable_s + float(self.filled_s @ all_layers) / chunks,
                rates=(share * stable_rates - filled_s / chunks) / each,
                limit=step_s,
            )

    def _each(self, levels: Sequence[MemoryLevel]) -> Floats:
        return np.tile(self.weight, len(levels))[:, None]

    def _output(self, name: str, levels: Sequence[MemoryLevel]) -> tuple[Floats, Floats]:
        """The least that an output has on top of its layers, [P], and of each of them, [X, P]."""
        num_kinds = len(self.weight)
        rows = [[LEVELS.index(level) * num_kinds + q for q in range(num_kinds)] for level in levels]
        if num_kinds == 1:
            base = self.lines.base(name, sum(1 << own[0] for own in rows), self.held)
        else:
            alone = [[self.lines.base(name, 1 << row, self.held) for row in own] for own in rows]
            base = np.min(alone, axis=1).max(axis=0)
        rates = [self.lines.rise(name, row, self.held)[:, 0] for own in rows for row in own]
        return base, np.stack(rates)


def _alone(line: _Line) -> Floats:
    """The load that one line allows, [P]."""
    return _quotient(line.limit - line.base, line.rates.min(axis=0))


def _both(times: _Line, bytes_: _Line) -> Floats:
    """The load that a time and bytes allow together, [P]: both levels of a mix cost the same."""
    most = np.full(times.base.shape, np.inf)
    half = len(times.rates) // 2
    for upper, lower in [(row, half + row) for row in range(half)]:
        with np.errstate(divide="ignore", invalid="ignore"):
            price = (times.rates[lower] - times.rates[upper]) / (
                bytes_.rates[upper] - bytes_.rates[lower]
            )
        price = np.where(np.isfinite(price) & (price > 0), price, 0.0)
        room = times.limit - times.base + price * (bytes_.limit - bytes_.base)
        most = np.minimum(most, _quotient(room, (times.rates + price * bytes_.rates).min(axis=0)))
    return most


def _quotient(room: Floats, rate: Floats) -> Floats:
    """Room over rate; none where there is no room, any load where it costs nothing."""
    most = np.full(room.shape, np.inf)
    np.divide(room, rate, out=most, where=rate > 0)
    most[room < 0] = -np.inf
    return most
