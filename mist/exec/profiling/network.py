"""What passes between nodes: one rank of torchrun measures it together with all others."""

import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from mist.exec.build.process_group import process_group
from mist.exec.profiling.clock import Clock
from mist.exec.profiling.links import COLLECTIVES, buffers, into_fresh, there_and_back
from mist.exec.profiling.readings import Readings, Request


def read_network(request: Request, timeout_s: float) -> Readings:
    """Collectives over all ranks of all nodes, and transfers between neighbouring nodes.

    `about`: `nodes`, and `ranks` on each of them. Ranks that come `timeout_s` later than others
    find them gone. Raises InputError when a rank has no device of its own.
    """
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    with process_group(timeout_s) as device:
        torch.manual_seed(dist.get_rank())
        clock = Clock.within(request, device)
        _read_collectives(clock)
        there_and_back(clock, "send to node", _neighbour(local), leads=_node(local) % 2 == 0)
        about: dict[str, str | float] = {"nodes": dist.get_world_size() // local, "ranks": local}
        return Readings(about=about, rows=tuple(clock.rows))


def _read_collectives(clock: Clock) -> None:
    world = dist.get_world_size()
    for name, start in COLLECTIVES.items():
        for num_bytes in _sizes(clock, world):
            call = into_fresh(start, *buffers(clock.device, num_bytes, world), dist.group.WORLD)
            clock.read(f"{name} over nodes", {"bytes": num_bytes}, call)


def _sizes(clock: Clock, world: int) -> Iterator[int]:
    """Those of collectives in a node, in whole numbers of each rank's share."""
    for num_bytes in clock.sizes.collective_bytes:
        if size := num_bytes // (4 * world) * 4 * world:
            yield size


def _node(local: int) -> int:
    return dist.get_rank() // local


def _neighbour(local: int) -> int | None:
    """The same rank of the next node, or of the one before; none of the last of an odd number."""
    other = dist.get_rank() + (local if _node(local) % 2 == 0 else -local)
    return other if other < dist.get_world_size() else None
