"""Host memory that the ranks of a node share.

As a rule each rank has an equal share: then nothing ties stages together. It excludes pipelines in
which a stage holds more than its share beside stages that hold less, such as one that keeps the
activations of more micro-batches. Where several stages stand on one node (all of the same size,
which divides the node), they may share its memory instead:

    sum over the stages i of a node of h_i  <=  stages per node * equal share

with h_i the bytes of one rank of stage i. So all stages together hold no more than all nodes: where
even the least that each range of layers can do with does not fit, no plan of the group does, which
is known before any frontier is made (`has_room`). Stages of unequal size, and runtimes whose stages
must be alike, keep to equal shares.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mist.pareto.frontier_points import StageMixes
from mist.pareto.layer_partition import least_sum
from mist.pareto.layer_ranges import Ranges
from mist.pareto.strategies import Floats, Group
from mist.plans.plan import Limits
from mist.symbolic.job import Job


def stages_per_node(job: Job, group: Group) -> int:
    """Stages that stand on one node and may share its host memory; 1: none do."""
    size, per_node = group.sizes[0], job.platform.gpus_per_node
    alone = len(group.sizes) > 1 or per_node % size != 0
    return 1 if alone else min(per_node // size, group.num_stages)


def shared(limits: Limits, num_stages: int) -> Limits:
    """What one rank may hold when the other stages of its node hold nothing there."""
    return replace(limits, host_bytes=limits.host_bytes * num_stages, shares_host=True)


def has_room(ranges: Ranges, num_layers: int, least_bytes: Floats, total_bytes: float) -> bool:
    """Whether a split of the layers may fit the hosts of all nodes.

    `least_bytes` [S, R]: that any point of a stage has in host memory, inf where it has no point.
    """
    slack = 1.0 + 1e-9  # rounding alone must not rule a plan out
    return least_sum(ranges, num_layers, least_bytes) <= total_bytes * slack


def crowded_out(
    table: StageMixes, least_s: Floats, num_strategies: int, *, step_s: float, limits: Limits
) -> NDArray[np.bool_]:
    """Which strategies and ranges [K, R] an equal share may keep out of a plan within `step_s`.

    No mix holds more than all layers at one of the levels does, nor is one faster than the fastest
    of these. They come first in the table; `least_s` [N, R] bounds the steps of their plans.
    """
    whole = slice(int((table.upper == table.lower).sum()))
    shape = (-1, num_strategies, least_s.shape[1])
    most_bytes = table.host_bytes[whole].reshape(shape).max(axis=0, initial=0.0)
    soonest_s = least_s[whole].reshape(shape).min(axis=0, initial=np.inf)
    return np.asarray((most_bytes > limits.host_bytes) & (soonest_s <= step_s))
