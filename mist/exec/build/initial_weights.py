"""A rank's part of the initial values of parameters, from wherever they come."""

import torch
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from mist.exec.build.tensor_parts import SideBySide, fill_part, read_within
from mist.exec.build.weight_init import Whole


def fill(parameter: torch.Tensor, value: Whole, matrices: SideBySide | None = None) -> None:
    """Give a parameter its part of a whole value, which every rank can read.

    `matrices`: side by side in it; none where its rows are in the model's order.
    """
    target = parameter.detach()
    if isinstance(target, DTensor) and matrices is not None:
        bounds = bounds_of(target)
        fill_part(target, value[read_within(target, bounds, matrices)], bounds, matrices)
    elif isinstance(target, DTensor):
        target.to_local().copy_(value[bounds_of(target)])
    else:
        target.copy_(value[tuple(slice(0, size) for size in target.shape)])


def bounds_of(target: DTensor) -> tuple[slice, ...]:
    """Where this rank's part lies in the whole, in each dimension.

    FSDP2 divides what tensor parallelism (the last axis) divided before, both as `torch.chunk`.
    """
    mesh = target.device_mesh
    place = mesh.get_coordinate()
    assert place is not None
    bounds = [range(size) for size in target.shape]
    for axis in reversed(range(mesh.ndim)):
        placement = target.placements[axis]
        if isinstance(placement, Shard | _StridedShard):
            whole = bounds[placement.dim]
            # As torch.chunk: parts are rounded up, the last ranks may have less or nothing.
            size = -(-len(whole) // mesh.size(axis))
            bounds[placement.dim] = whole[place[axis] * size : (place[axis] + 1) * size]
    return tuple(slice(each.start, each.stop) for each in bounds)
