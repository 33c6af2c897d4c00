"""Unequal meshes: the sizes that stages may have, and where in the cluster each may begin.

A stage takes a power of two of a node's devices, aligned so that it does not straddle nodes, or
whole nodes. Which borders of nodes it touches depends on where it begins: `places` lists the ways,
each with the beginnings that go with it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

# Stages may have from half to twice the devices of an equal share (rounded down to a power of two).
# More unequal ones were never faster on the jobs that were searched whole (docs/performance.md).
SPREAD: Final = 2
# The join grows with the square of the units; beyond this an equal split is looked at only.
MOST_UNITS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePosition:
    """A way to stand between nodes: 1 where the border to the neighbour is one of nodes.

    `begins` [size]: the first devices, counted in units, at which a stage of that size stands so.
    """

    prev_crosses: int
    next_crosses: int
    begins: Mapping[int, tuple[int, ...]]


def unequal_sizes(num_gpus: int, num_stages: int, per_node: int) -> tuple[int, ...]:
    """Sizes of stages that differ, ascending; empty where they all must be equal."""
    if num_stages < 2 or num_gpus < num_stages:
        return ()
    share = 1 << (num_gpus // num_stages).bit_length() - 1
    found = [share // SPREAD, share, share * SPREAD]
    sizes = tuple(size for size in found if size >= 1 and _fills(size, per_node))
    if len(sizes) < 2 or num_gpus // sizes[0] > MOST_UNITS:
        return ()
    reachable = num_stages * sizes[0] < num_gpus < num_stages * sizes[-1]
    return sizes if reachable and num_gpus % sizes[0] == 0 else ()


def depths(num_gpus: int, most: int, per_node: int, size: int) -> list[int]:
    """Numbers of stages, at most `most`, of pipelines in which a stage may have this size."""
    counts = range(2, min(num_gpus, most) + 1)
    return [count for count in counts if size in unequal_sizes(num_gpus, count, per_node)]


def _fills(size: int, per_node: int) -> bool:
    return per_node % size == 0 or size % per_node == 0


def places(
    stage: int, num_stages: int, sizes: tuple[int, ...], *, num_gpus: int, per_node: int
) -> Iterator[NodePosition]:
    """The ways in which a stage may stand, each size with its beginnings."""
    found: dict[tuple[int, int], dict[int, list[int]]] = {}
    for size in sizes:
        for begin in range(0, num_gpus - size + 1, min(size, per_node)):
            first, last = begin == 0, begin + size == num_gpus
            if (stage == 0) is not first or (stage == num_stages - 1) is not last:
                continue
            borders = (int(begin % per_node == 0), int((begin + size) % per_node == 0))
            found.setdefault(borders, {}).setdefault(size, []).append(begin // sizes[0])
    for (prev_crosses, next_crosses), begins in sorted(found.items()):
        yield NodePosition(
            prev_crosses=prev_crosses,
            next_crosses=next_crosses,
            begins={size: tuple(units) for size, units in begins.items()},
        )
