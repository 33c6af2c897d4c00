"""Bounds that prune without changing the optimum, from times without offloading or recomputation.

With tau the least stable time of all layers and ends together, over the strategies of a group: the
slowest of S stages takes at least tau / S, and a lone micro-batch fills at least all of it,

    T >= (G - 1) tau / S + (tau - w) / v

for v chunks and, under zero bubble, w twice the largest time of gradients of weights. Neither
offloading nor recomputation makes a stage faster than keeping everything on the device does.
"""

import numpy as np
from numpy.typing import NDArray

from mist.estimate import Job
from mist.pareto.space import Group
from mist.pareto.table import GroupModel, Ranges, kinds_of
from mist.spec import ScheduleKind


def lower_bound_s(job: Job, group: Group) -> float:
    """Seconds that no plan of the group undercuts."""
    terms = group.strategies.terms
    layers = job.kind_prefix[:, -1]
    blocks = [(str(kind), int(count)) for kind, count in enumerate(layers)]
    blocks += [("embed", 1), ("head", 1)]
    total_s = sum(count * terms[f"term_{x}_eager_stable_s"].min() for x, count in blocks)
    spared_s = 0.0
    if group.schedule.kind is ScheduleKind.ZERO_BUBBLE:
        spared_s = 2 * sum(count * terms[f"term_{x}_weight_s"].max() for x, count in blocks)
    filled_s = max(total_s - spared_s, 0.0) / group.schedule.vpp
    micro = group.num_micro_batches
    return float(
        (micro - 1) * total_s / group.num_stages + max(filled_s, total_s / group.num_stages)
    )


def window(model: GroupModel, ranges: Ranges, upper_bound_s: float) -> NDArray[np.bool_]:
    """Ranges that a plan no slower than `upper_bound_s` may have, [R].

    A stage of l layers takes at least l tau_0 per micro-batch, tau_0 of the fastest layer, and G of
    them; and what it does not take the S - 1 others must.
    """
    group, job = model.group, model.job
    if not np.isfinite(upper_bound_s):
        return np.ones(len(ranges), dtype=np.bool_)
    kinds = kinds_of(job, ranges)
    fastest = np.array(
        [model.strategies.terms[f"term_{kind}_eager_stable_s"].min() for kind in range(len(kinds))]
    )
    own_s = fastest @ kinds
    total_s = float(fastest @ job.kind_prefix[:, -1])
    longest_s = upper_bound_s * (1 + 1e-9) / group.num_micro_batches
    rest_s = (group.num_stages - 1) * longest_s
    rounding_s = 1e-9 * total_s
    return np.asarray((own_s <= longest_s) & (total_s - own_s <= rest_s + rounding_s))
