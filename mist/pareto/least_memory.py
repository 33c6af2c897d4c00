"""The least memory with which a group of layouts can train: what `--objective memory` asks for.

The peak of a layout is that of its fullest stage, as a backward pass begins or as it ends. Each is
a sum of lines in its offload ratios and in the number of layers at a lower memory level, and of
maxima over the blocks and levels that it has at all. So it is least

    at the ends of each ratio of a state and at any of activations (`lean_ratios`), or, where host
    memory binds, at one of the ratios in between;
    with all layers at one level, or with as many at the lower one as need no further kind of block
    to be recomputed: between two such numbers the peak falls with each layer.

Stages that may be unlike choose for themselves and share the layers so that the fullest holds least
(`mist.pareto.layer_partition`); those that must be alike have one strategy and one mix for all.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from mist.pareto.candidates import GroupModel
from mist.pareto.layer_partition import even_split
from mist.pareto.layer_ranges import Ranges, layer_ranges, placed
from mist.pareto.offload_ratios import lean_ratios, offloading
from mist.pareto.stage_mixes import Mixes
from mist.pareto.strategies import Floats, Group, Ints, groups, with_least_memory
from mist.pareto.uniform_layouts import stage_layers
from mist.plans.plan import Limits
from mist.plans.search_space import SearchSpace
from mist.symbolic.job import Job

ROUNDING_RATIO: Final = 1e-12  # of a peak: the same sum taken in another order


@dataclass(frozen=True, slots=True, kw_only=True)
class Leanest:
    """The least peak of the fullest device, and with how many stages layouts reach it."""

    peak_bytes: float
    num_stages: tuple[int, ...]


def leanest(job: Job, space: SearchSpace, *, host_bytes: float) -> Leanest:
    """The least peak of the fullest device that any layout of the space reaches.

    Infinite where no layout has room in host memory, or the space is empty. Stages of unequal size
    are not among the layouts.
    """
    space = replace(with_least_memory(space), unequal_meshes=False)
    found: dict[int, float] = {}
    for group in groups(job, space):
        peak_bytes = _of_group(job, space, group, host_bytes)
        found[group.num_stages] = min(peak_bytes, found.get(group.num_stages, math.inf))
    least = min(found.values(), default=math.inf)
    slack = least * (1 + ROUNDING_RATIO)
    return Leanest(
        peak_bytes=least,
        num_stages=tuple(stages for stages, peak in found.items() if peak <= slack),
    )


def _of_group(job: Job, space: SearchSpace, group: Group, host_bytes: float) -> float:
    """The least peak of a group: every ratio is tried where the ends of each do not tell."""
    narrow = replace(space, offload=lean_ratios(space))
    least = _least(job, narrow, group, host_bytes)
    # Unlimited host memory gives the same peak, so it does not bind: the ends suffice.
    if least == _least(job, narrow, group, math.inf):
        return least
    return _least(job, space, group, host_bytes)


def _least(job: Job, space: SearchSpace, group: Group, host_bytes: float) -> float:
    away = offloading(job, group, space, np.arange(len(group.strategies)))
    model = GroupModel(job, group, group.strategies.joined(away), space)
    if not model.space.levels:
        return math.inf
    limits = Limits(device_bytes=math.inf, host_bytes=host_bytes)
    return _unlike(model, limits) if model.space.unlike_stages else _alike(model, limits)


def _unlike(model: GroupModel, limits: Limits) -> float:
    """Every stage takes what suits it best; of a tied model both ends divide its matrix alike."""
    group, num_layers = model.group, model.job.num_layers
    ranges = layer_ranges(model.job, group.num_stages, least=group.schedule.vpp)
    ways = list(model.ties(0))
    value = np.full((len(ways), group.num_stages, len(ranges)), np.inf)
    for stage in range(group.num_stages):
        ties = model.ties(stage)
        rows = [ties[way if model.is_tied(stage) else None] for way in ways]
        for mix in _mixes(model, stage, ranges, limits):
            least = [_peaks(mix)[own].min(axis=0, initial=np.inf) for own in rows]
            value[:, stage] = np.minimum(value[:, stage], least)
        value[:, stage, ~placed(ranges, num_layers, group.num_stages, stage)] = np.inf
    picked = even_split(ranges, num_layers, value)
    stages = np.arange(group.num_stages)
    peaks = [value[k, stages, own].max() for k, own in enumerate(picked) if own[0] >= 0]
    return float(min(peaks, default=math.inf))


def _mixes(model: GroupModel, stage: int, ranges: Ranges, limits: Limits) -> Iterator[Mixes]:
    """Stages of one level, and those of two that recompute all but certain kinds of blocks."""
    for level in model.levels:
        none = np.zeros((len(model.strategies), len(ranges)), dtype=np.int64)
        yield model.mix(stage, ranges, limits, level, level, num_lower=none)
    if model.job.facts.num_kinds > 1:
        for upper, lower in model.pairs:
            for before in _layers_before(model.job, ranges):
                num_lower = np.broadcast_to(before, (len(model.strategies), len(ranges)))
                yield model.mix(stage, ranges, limits, upper, lower, num_lower=num_lower)


def _layers_before(job: Job, ranges: Ranges) -> Iterator[Ints]:
    """For each kind of block the layers of each range before its first one of that kind, [R]."""
    for prefix in job.kind_prefix:  # the last place up to which there are as many of that kind
        place = np.searchsorted(prefix, prefix[ranges.first], side="right") - 1
        yield np.clip(place - ranges.first, 0, ranges.count)


def _alike(model: GroupModel, limits: Limits) -> float:
    """One strategy and one mix for all stages, layers dealt out by the runtime's rule."""
    counts = stage_layers(model)
    if counts is None:
        return math.inf
    ranges = Ranges(first=np.cumsum(counts) - counts, count=counts, alike=False)
    pairs = [(level, level, 0) for level in model.levels]
    chunks = model.group.schedule.vpp  # one number for all: so many layers of each chunk
    numbers = range(chunks, int(counts.max()), chunks)
    pairs += [(*pair, lower) for pair in model.pairs for lower in numbers]
    least = math.inf
    for upper, lower, num_lower in pairs:
        each = np.full((len(model.strategies), len(counts)), num_lower)
        peaks = [
            _peaks(model.mix(stage, ranges, limits, upper, lower, num_lower=each))[:, stage]
            for stage in range(len(counts))
        ]
        least = min(least, float(np.max(peaks, axis=0).min(initial=np.inf)))
    return least


def _peaks(mix: Mixes) -> Floats:
    """Peaks, infinite where a mix is not possible or has no room in host memory."""
    return np.where(mix.fits, mix.peak_bytes, np.inf)
