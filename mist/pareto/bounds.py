"""Bounds that prune without changing the optimum, from times without offloading or recomputation.

Times are those of the fastest memory level: the one that keeps everything, or one that converts
layers, whose kernels may be fewer.

With omega the least device seconds (stable time times devices of the stage) of all layers and ends
together, and tau their least stable time, over the strategies of a group: the slowest stage takes
at least omega / N, and a lone micro-batch fills at least all of tau,

    T >= (G - 1) omega / N + max( omega / N, (tau - w) / v )

for N devices, v chunks and, under zero bubble, w twice the largest time of gradients of weights.
But for zero bubble the lone micro-batch passes through all of the first stage before it fills the
others. If that has x of tau, the S - 1 others have the rest, so that with r the least ratio of lone
to stable time of any block

    T >= min over x of  (G - 1) max( omega / N, (tau - x) / (S - 1) ) + r x + (tau - x) / v

which has straight pieces: it is least at x = 0, at x = tau, or where both of the first maximum are
the same. Neither offloading
nor recomputation makes a stage faster than keeping everything on the device; together they may:
recomputation leaves less to copy.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mist.pareto.candidates import GroupModel
from mist.pareto.layer_ranges import Ranges, kinds_of
from mist.pareto.level_choice import allowed_levels, fastest_s
from mist.pareto.strategies import Floats, Group
from mist.plans.memory_levels import CONVERTS, KEEPS_ALL
from mist.plans.schedules import SCHEDULES, fill_time, spare_time
from mist.plans.workload import MemoryLevel
from mist.symbolic.job import Job


def lower_bound_s(job: Job, group: Group, levels: Sequence[MemoryLevel]) -> float:
    """Seconds that no plan of the group undercuts whose layers have `levels`."""
    terms = group.strategies.terms
    layers = job.kind_prefix[:, -1]
    blocks = [(str(kind), int(count)) for kind, count in enumerate(layers)]
    blocks += [("embed", 1), ("head", 1)]
    stable, lone = (_fastest(job, group, levels, name) for name in ("stable_s", "lone_s"))
    # Each kind of layer takes its own best strategy: no plan can do better than this relaxation.
    total_s = sum(count * stable[x].min() for x, count in blocks)
    devices = group.strategies.num_devices
    device_s = sum(count * (devices * stable[x]).min() for x, count in blocks)
    slowest_s = device_s / job.platform.num_gpus
    # The largest, because more spare time means a shorter filling, and this must bound all plans.
    weight_s = sum(count * terms[f"term_{x}_weight_s"].max() for x, count in blocks)
    spare_s = spare_time(group.schedule.kind, weight_s)
    fill_s = float(fill_time(total_s, spare_s, chunks=group.schedule.vpp))
    bound_s = (group.num_micro_batches - 1) * slowest_s + max(fill_s, slowest_s)
    if group.num_stages == 1 or SCHEDULES[group.schedule.kind].splits_backward:
        return float(bound_s)
    ratio = min(
        (lone[x].min() / stable[x].min() for x, _ in blocks if stable[x].min() > 0), default=0.0
    )
    # Where the others, alike, take as long as the slowest at least: for stages of one size tau / S.
    kink_s = max(total_s - (group.num_stages - 1) * slowest_s, 0.0)
    first_s = np.array([0.0, kink_s, total_s])
    others_s = total_s - first_s
    longest_s = np.maximum(slowest_s, others_s / (group.num_stages - 1))
    lone_s = ratio * first_s + others_s / group.schedule.vpp
    steps_s = (group.num_micro_batches - 1) * longest_s + lone_s
    # Rounding alone must never rule a group out.
    return max(float(bound_s), float(steps_s.min()) * (1 - 1e-12))


def _fastest(job: Job, group: Group, levels: Sequence[MemoryLevel], name: str) -> dict[str, Floats]:
    """Seconds `name` of each block under each strategy, [K], at the fastest of the levels."""
    strategies = group.strategies
    faster = [KEEPS_ALL, *(each for each in levels if each in CONVERTS and each in job.levels)]
    allowed = allowed_levels(strategies, faster, group.schedule.kind)
    kinds = range(job.facts.num_kinds)
    found = {str(kind): fastest_s(strategies, allowed, kind, name) for kind in kinds}
    return found | {
        end: strategies.terms[f"term_{end}_{KEEPS_ALL}_{name}"] for end in ("embed", "head")
    }


def window(
    model: GroupModel, ranges: Ranges, step_s: float, *, alone: bool = False
) -> NDArray[np.bool_]:
    """Ranges that a stage may have in a plan no slower than `step_s`, [R].

    The slowest stage takes at most step_s / G. This one takes at least its layers times the
    fastest; and unless it is looked at `alone`, the S - 1 others must take the other layers.
    """
    if not np.isfinite(step_s):
        return np.ones(len(ranges), dtype=np.bool_)
    fastest_s, kinds = fastest_layers(model), kinds_of(model.job, ranges)
    # The slack keeps the ranges of the best plan itself, whose times sum with other rounding.
    longest_s = step_s * (1 + 1e-9) / model.group.num_micro_batches
    own_s = fastest_s @ kinds
    if alone:
        return np.asarray(own_s <= longest_s)
    all_s = float(fastest_s @ model.job.kind_prefix[:, -1])
    others_s = (model.group.num_stages - 1) * longest_s + 1e-9 * all_s
    return np.asarray((own_s <= longest_s) & (all_s - own_s <= others_s))


def fastest_layers(model: GroupModel) -> Floats:
    """Seconds of a layer of each kind under the strategy and level that are fastest at it."""
    # Where activations are offloaded, a layer that keeps less has less to copy: the level that
    # recomputes nothing need not be the fastest.
    kinds = range(model.job.facts.num_kinds)
    seconds = (fastest_s(model.strategies, model.allowed, kind, "stable_s") for kind in kinds)
    return np.array([each.min() for each in seconds])


def least_step_s(model: GroupModel, ranges: Ranges, stable_s: Floats, lone_s: Floats) -> Floats:
    """Seconds that no plan undercuts which has a stage with these times, [N, R].

    (G - 1) t + max(u, fill of all stages), the fill of the others being that of their layers.
    """
    if SCHEDULES[model.group.schedule.kind].splits_backward:
        # Weight gradients fill the bubble, so layers of other stages bound nothing here.
        exit_s = lone_s
    else:
        others = model.job.kind_prefix[:, -1:] - kinds_of(model.job, ranges)
        others_s = fastest_layers(model) @ others
        fill_s = fill_time(stable_s + others_s, chunks=model.group.schedule.vpp)
        exit_s = np.maximum(lone_s, fill_s * (1 - 1e-9))
    return np.asarray((model.group.num_micro_batches - 1) * stable_s + exit_s)
