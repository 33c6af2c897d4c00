"""Strategies that keep shares of their states and activations in host memory.

A strategy that offloads nothing (`mist.pareto.strategies`) with every tuple of offload ratios that
the space allows, the runtime can express and no rule forbids.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mist.pareto.strategies import Floats, Group, Ints, Strategies, expressible, keeps_rules
from mist.plans.search_space import OFFLOADED, SearchSpace
from mist.platform import Runtime
from mist.symbolic.job import Job


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
    strategies = many.altered(**dict(zip(OFFLOADED, away.T, strict=True)))
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
