"""Capacities that bound nothing, for searches that are to look at everything."""

import numpy as np

from mist.pareto.candidates import GroupModel
from mist.pareto.capacity import Capacity
from mist.pareto.layer_ranges import Ranges


def boundless(model: GroupModel, ranges: Ranges, *_: object, **__: object) -> Capacity:
    """Every position takes any range under any strategy."""
    shape = (model.group.num_stages, len(model.strategies))
    return Capacity(most=np.full(shape, 1e9), total=0.0, load=np.ones(len(ranges)))
