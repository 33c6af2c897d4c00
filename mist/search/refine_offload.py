"""The best layout's offload ratios on a finer grid around those that it has.

The search tries one grid of ratios for every layout. Around the winner each stage keeps its layers,
devices and strategy. Its ratios may be any multiple of 1/64 between the neighbours on the grid of
those that it has (whole layers of weights where these are offloaded whole), and its mix of memory
levels any that fits. Times and bytes are those of the search (`mist.pareto.candidates`), and the
join picks a point of each stage's frontier: the best of this finer grid, within the same limits. It
is taken where it gains a thousandth or more. Bounds and gaps of a plan are those of the grid.
"""

import math
from collections.abc import Iterator
from itertools import product
from typing import Final

import numpy as np

from mist.pareto.candidates import GroupModel
from mist.pareto.layer_ranges import Ranges
from mist.pareto.layouts import PricedLayout, StageChoice, plain_layout, stage_plans
from mist.pareto.offload_ratios import with_ratios
from mist.pareto.strategies import Group, Strategies, all_resident, expressible
from mist.pareto.unequal_meshes import NodePosition
from mist.plans.plan import Limits, PricedStages, fullest_host_bytes
from mist.plans.search_space import OFFLOADED, SearchSpace
from mist.search.stage_frontiers import Bounds, FixedStage, fixed_problem, joined
from mist.symbolic.estimate import priced_stages
from mist.symbolic.job import Job

STEPS: Final = 64  # of a ratio
WORTH: Final = 1e-3  # share of the step from which a gain is worth uneven ratios


def refined(
    job: Job, group: Group, space: SearchSpace, layout: PricedLayout, limits: Limits
) -> PricedLayout | None:
    """The best with finer ratios; None where it gains little, or not as plans write it."""
    space = expressible(space, job.platform.runtime)
    problem = fixed_problem(list(_stages(job, group, space, layout)), limits)
    found = joined(problem, Bounds(limits=limits, step_s=layout.step_s), "dp")
    if found is None or found[0].step_s > layout.step_s * (1 - WORTH):
        return None
    # A plan rounds offloaded weights up to whole layers: the gain must survive that.
    before, after = _written(job, layout), _written(job, found[0])
    faster = after.step_s <= before.step_s
    return found[0] if faster and _fits(job, found[0], after, limits) else None


def _stages(
    job: Job, group: Group, space: SearchSpace, layout: PricedLayout
) -> Iterator[FixedStage]:
    """Each stage where it stands, with its strategy at every finer tuple of ratios."""
    begin, per_node = 0, job.platform.gpus_per_node
    for stage in layout.stages:
        end = begin + stage.num_devices
        place = NodePosition(
            prev_crosses=int(begin % per_node == 0),
            next_crosses=int(end % per_node == 0),
            begins={},
        )
        ratios = np.array(list(_tuples(job, space, stage)))
        strategies = with_ratios(job, group, _strategy(stage), ratios)
        alike = job.facts.num_kinds == 1
        yield FixedStage(
            model=GroupModel(job, group, strategies, space),
            ranges=Ranges(
                first=np.array([0 if alike else stage.first]),
                count=np.array([stage.count]),
                alike=alike,
            ),
            place=place if len(group.sizes) > 1 else None,
        )
        begin = end


def _strategy(stage: StageChoice) -> Strategies:
    """What the stage does, nothing offloaded, as one row."""
    return all_resident({name: np.array([value]) for name, value in stage.knobs.items()})


def _tuples(job: Job, space: SearchSpace, stage: StageChoice) -> Iterator[tuple[float, ...]]:
    """The stage's own ratios and every finer tuple around them; weights go with gradients."""
    offload = job.platform.runtime.offload
    by_layer = offload is not None and offload.by_layer
    axes = {
        name: _around(
            space.offload[name],
            getattr(stage.offload, name),
            stage.count if by_layer and name in ("weights", "grads") else STEPS,
        )
        for name in OFFLOADED
    }
    for row in product(*axes.values()):
        if not by_layer or row[0] == row[1]:
            yield row


def _around(allowed: tuple[float, ...], ratio: float, steps: int) -> list[float]:
    """A ratio and the multiples of 1/steps between its neighbours among those allowed.

    Of two or fewer none lies between: they are all or nothing.
    """
    if len(allowed) <= 2:
        return [ratio]
    low = max((each for each in allowed if each < ratio), default=ratio)
    high = min((each for each in allowed if each > ratio), default=ratio)
    finer = range(math.ceil(low * steps), math.floor(high * steps) + 1)
    return sorted({ratio, *(each / steps for each in finer)})


def _written(job: Job, layout: PricedLayout) -> PricedStages:
    """A layout as a plan writes it: with whole layers of weights."""
    return priced_stages(job, plain_layout(job, layout))


def _fits(job: Job, layout: PricedLayout, judged: PricedStages, limits: Limits) -> bool:
    """Whether what is written fits too: whole layers of weights take more of the host."""
    held_bytes = [stage.host_bytes for stage in judged.stages]
    most_bytes: float = max(held_bytes)
    if limits.shares_host:
        plans, per_node = stage_plans(job, layout), job.platform.gpus_per_node
        most_bytes = fullest_host_bytes(plans, held_bytes, per_node) / plans[0].devices[1]
    slack = 1 + 1e-9  # estimates are whole bytes
    return most_bytes <= limits.host_bytes * slack and all(
        stage.peak_bytes <= limits.device_bytes * slack for stage in judged.stages
    )
