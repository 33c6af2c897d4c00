"""The most layers that a stage can hold and still be part of a plan that is fast enough.

A stage with t, u, and at every instant m bytes is part of a plan of step T or less only if, with F
the least stable time of the layers of the other stages, v chunks and M bytes of memory,

    (G - 1) t + u <= T,    (G - 1) t + e + (t + F) / v <= T,    m <= M                         (*)

where e is what the first stage takes more than its part of filling: at least 0, at least the least
of u - t / v over what the first stage may be, and of the first stage itself just u - t / v, so that
its second line holds the first one (zero bubble: without the second). The first holds because what
stages behind add to filling is not negative, the second because the lone micro-batch that leaves
the first stage after u passes through all others. All of them are lines in the numbers n_x of
layers at each level (`mist.pareto.linear_cost`), so each reads

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
from mist.pareto.candidates import GroupModel, StageTable
from mist.pareto.layer_ranges import Ranges, kinds_of
from mist.pareto.linear_cost import Held, StageLines, instants
from mist.pareto.strategies import Floats, Ints
from mist.plans.plan import Limits
from mist.plans.schedules import SCHEDULES

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
    entry_s = 0.0
    for table in model.together(len(model.strategies), ranges):
        is_first = bool(table.stages[0][0] == 0)  # what `together` begins with
        stages, lines, held = _least(table, coarse=coarse)
        knapsack = _Knapsack(model=model, lines=lines, held=held, weight=weight, filled_s=fastest_s)
        if is_first:
            entry_s = knapsack.entry_s(load)
        times = knapsack.times(step_s * (1 + _SLACK), None if is_first else entry_s)
        found = knapsack.most(limits.device_bytes, list(times))
        for own, each in zip(stages, found, strict=True):
            most[own] = each
    if len(layers) == 1:
        # Of one kind the load is a number of layers: the slack keeps 3.9999999999 from becoming 3.
        most = np.floor(most * (1 + _SLACK))
    most = np.minimum(most, load.max(initial=-np.inf))
    most[most < load.min(initial=np.inf) * (1 - _SLACK)] = -np.inf
    # Rounding alone must never rule a plan out: the total loses more slack than the loads.
    return Capacity(
        most=most, total=float(weight @ layers) * (1 - 2 * _SLACK), load=load * (1 - _SLACK)
    )


def _least(table: StageTable, *, coarse: bool) -> tuple[list[Ints], StageLines, Held]:
    """Stages [F] and the least that an average layer of each holds in any range, [F, 1].

    `coarse`: stages with the same lines as one, which holds least of all.
    """
    more = table.held.layers_more.min(axis=1, keepdims=True)
    parts = table.lines.parts or (table.lines,) * len(table.stages)
    if not coarse:
        return table.stages, table.lines, replace(table.held, layers_more=more)
    rows: dict[int, list[int]] = {}
    for row, part in enumerate(parts):
        rows.setdefault(id(part), []).append(row)
    held = [(table.held.in_flight[own].min(), more[own].min()) for own in rows.values()]
    in_flight, least_more = np.array(held).T
    return (
        [np.concatenate([table.stages[row] for row in own]) for own in rows.values()],
        StageLines.stacked([parts[own[0]] for own in rows.values()]),
        Held(in_flight=in_flight, layers_more=least_more[:, None]),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Budget:
    """c_0 [P, N] and c_x per load [P, X, N] of N stages under P mixes, and what they may come to.

    x: the kinds at the upper level of a mix, then those at the lower one. Of bytes there is one for
    each instant, [I, P, N] and [I, P, X, N].
    """

    base: Floats
    rates: Floats
    limit: float

    def load(self) -> Floats:
        """What the line alone allows, shaped like `base`."""
        return _quotient(self.limit - self.base, self.rates.min(axis=-2))

    def load_beside(self, bytes_: "_Budget") -> Floats:
        """What this and bytes allow together, [I, P, N]: both levels of a mix cost the same."""
        most = np.full(bytes_.base.shape, np.inf)
        half = self.rates.shape[-2] // 2
        for kind in range(half):
            slower = self.rates[:, half + kind] - self.rates[:, kind]
            saved = bytes_.rates[:, :, kind] - bytes_.rates[:, :, half + kind]
            # A lower level that is faster, or saves nothing, has no price: any mu is valid, also 0.
            price = np.zeros(saved.shape)
            np.divide(slower, saved, out=price, where=(slower > 0) & (saved > 0))
            room = self.limit - self.base + price * (bytes_.limit - bytes_.base)
            rate = (self.rates + price[:, :, None] * bytes_.rates).min(axis=-2)
            most = np.minimum(most, _quotient(room, rate))
        return most


def _quotient(room: Floats, rate: Floats) -> Floats:
    """Room over rate; none where there is no room, any load where it costs nothing."""
    most = np.full(room.shape, np.inf)
    np.divide(room, rate, out=most, where=rate > 0)
    most[room < 0] = -np.inf
    return most


class _Knapsack:
    """The stages of one kind of position: K strategies for each of F micro-batches in flight."""

    def __init__(
        self, model: GroupModel, lines: StageLines, held: Held, weight: Floats, filled_s: Floats
    ) -> None:
        """`weight` [Q]: load of a layer of each kind; `filled_s` [Q]: seconds of the fastest."""
        self._model, self._lines, self._held = model, lines, held
        self._weight, self._filled_s = weight, filled_s
        levels = model.levels
        mixes = [*((level, level) for level in levels), *model.pairs]
        useful = [model.useful[upper] & model.useful[lower] for upper, lower in mixes]
        self._useful = np.tile(np.array(useful), len(held.in_flight))
        self._mixes = np.array([[levels.index(level) for level in mix] for mix in mixes]).T
        self._instants = instants(model.job.platform.runtime)
        base, rates = self._outputs(("stable_s", "lone_s", *self._instants))
        self._stable, self._lone = zip(base[:2], rates[:2], strict=True)
        self._bytes = (base[2:], rates[2:])

    def most(self, device_bytes: float, times: Sequence[_Budget]) -> Floats:
        """The load, [F, K]."""
        found = [each.load() for each in times]
        if np.isfinite(device_bytes):
            base, rates = self._bytes
            bytes_ = _Budget(base=base, rates=rates / self._weights, limit=device_bytes)
            several = [bytes_.load(), *(each.load_beside(bytes_) for each in times)]
            found += [each.min(axis=0) for each in several]
        most = np.where(self._useful, np.min(found, axis=0), -np.inf).max(axis=0, initial=-np.inf)
        return np.asarray(most.reshape(len(self._held.in_flight), -1))

    def entry_s(self, load: Floats) -> float:
        """The least seconds of a first stage beyond its part of filling: e, for loads [R]."""
        (lone_s, lone_rates), (fill_s, fill_rates) = self._lone, self._fill()
        if self._splits_backward or not lone_s.size or not load.size:
            return 0.0
        rate = ((lone_rates - fill_rates) / self._weights).min(axis=1)
        entry_s = lone_s - fill_s + np.minimum(rate * load.min(), rate * load.max())
        return max(float(entry_s.min()) * (1 - _SLACK), 0.0)

    def times(self, step_s: float, entry_s: float | None) -> Iterator[_Budget]:
        """The lines in seconds of a step; `entry_s`: e, None of the first stage itself."""
        rounds = self._model.group.num_micro_batches - 1
        (stable_s, stable_rates), (lone_s, lone_rates) = self._stable, self._lone
        filling = None if self._splits_backward else self._fill()
        if filling is None or entry_s is not None:
            rates = (rounds * stable_rates + lone_rates) / self._weights
            yield _Budget(base=rounds * stable_s + lone_s, rates=rates, limit=step_s)
        if filling is not None:
            # The first stage fills with all of a lone micro-batch, others with their part behind e.
            (own_s, own_rates) = self._lone if entry_s is None else filling
            chunks = self._model.group.schedule.vpp
            all_s = float(self._filled_s @ self._model.job.kind_prefix[:, -1])
            others_rates = np.tile(self._filled_s, 2)[None, :, None] / chunks
            base = rounds * stable_s + own_s + (all_s / chunks + (entry_s or 0.0))
            rates = (rounds * stable_rates + own_rates - others_rates) / self._weights
            yield _Budget(base=base, rates=rates, limit=step_s)

    def _fill(self) -> tuple[Floats, Floats]:
        """What a stage adds to filling."""
        chunks = self._model.group.schedule.vpp
        return self._stable[0] / chunks, self._stable[1] / chunks

    @property
    def _splits_backward(self) -> bool:
        return SCHEDULES[self._model.group.schedule.kind].splits_backward

    @property
    def _weights(self) -> Floats:
        """Load of a layer of each kind at either level of a mix, [1, X, 1]."""
        return np.tile(self._weight, 2)[None, :, None]

    def _outputs(self, names: Sequence[str]) -> tuple[Floats, Floats]:
        """What I outputs have on top of their layers, [I, P, N], and for each, [I, P, X, N]."""
        levels, num_kinds = self._model.levels, len(self._weight)
        rows = (
            np.array([self._model.job.levels.index(level) for level in levels])[:, None] * num_kinds
        )
        rows = rows + np.arange(num_kinds)
        rises = self._lines.rises(names, rows, self._held)[..., 0]
        upper, lower = self._mixes
        rates = np.concatenate([rises[:, upper], rises[:, lower]], axis=2)
        bits = 1 << rows
        if num_kinds == 1:
            mixes = (bits[upper, 0] | bits[lower, 0]).tolist()
            return self._lines.constants(names, mixes, self._held), rates
        # A level costs at least the constant of one kind. A mix takes at least the seconds of both
        # its levels; of bytes those of one, as the layers of the other may be gone.
        alone = self._lines.constants(names, bits.ravel().tolist(), self._held)
        alone = alone.reshape(*rises.shape).min(axis=2)
        each = np.stack([alone[:, upper], alone[:, lower]])
        in_seconds = np.array([name.endswith("_s") for name in names])[:, None, None]
        return np.where(in_seconds, each.max(axis=0), each.min(axis=0)), rates
