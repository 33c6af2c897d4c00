"""Unequal meshes against every placement there is."""

import itertools

import pytest

from mist.pareto.unequal_meshes import places, unequal_sizes


def placements(sizes: tuple[int, ...], num_stages: int, num_gpus: int, per_node: int) -> list:
    """Every way to put stages of these sizes one behind the other, none astride two nodes."""
    found = []
    for meshes in itertools.product(sizes, repeat=num_stages):
        begins = [sum(meshes[:i]) for i in range(num_stages)]
        aligned = all(
            begin % min(size, per_node) == 0 for begin, size in zip(begins, meshes, strict=True)
        )
        if sum(meshes) == num_gpus and aligned:
            found.append(list(zip(begins, meshes, strict=True)))
    return found


@pytest.mark.parametrize(
    ("num_gpus", "num_stages", "per_node"), [(8, 3, 8), (16, 3, 8), (32, 5, 8), (32, 3, 8)]
)
def test_every_placement_is_one_of_the_places(
    num_gpus: int, num_stages: int, per_node: int
) -> None:
    sizes = unequal_sizes(num_gpus, num_stages, per_node)
    assert len(sizes) >= 2
    known = [
        {
            (begin * sizes[0], size): (place.prev_crosses, place.next_crosses)
            for place in places(stage, num_stages, sizes, num_gpus=num_gpus, per_node=per_node)
            for size, begins in place.begins.items()
            for begin in begins
        }
        for stage in range(num_stages)
    ]
    every = placements(sizes, num_stages, num_gpus, per_node)
    assert every
    for layout in every:
        for stage, (begin, size) in enumerate(layout):
            borders = (int(begin % per_node == 0), int((begin + size) % per_node == 0))
            assert known[stage][begin, size] == borders


@pytest.mark.parametrize(
    ("num_gpus", "num_stages", "per_node", "sizes"),
    [
        (8, 1, 8, ()),  # one stage has everything
        (8, 8, 8, ()),  # one device each
        (2, 2, 8, ()),
        (8, 3, 8, (1, 2, 4)),
        (8, 2, 8, (2, 4, 8)),
        (32, 5, 8, (2, 4, 8)),
        (64, 3, 8, (8, 16, 32)),
        (16384, 100, 8, ()),  # more units than the join takes
        (16384, 12, 8, (512, 1024, 2048)),
    ],
)
def test_sizes_are_near_an_equal_share(
    num_gpus: int, num_stages: int, per_node: int, sizes: tuple[int, ...]
) -> None:
    assert unequal_sizes(num_gpus, num_stages, per_node) == sizes
