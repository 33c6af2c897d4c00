"""Mappings among a layer's arguments: what one layer writes into them, later ones read.

Gemma 3n and 4 hand keys and values on in this way. A layer is recorded on copies of them, as on
leaves of its tensors, and what it added is an output like what it returned. Only a dict is a tree
to torch, so others count as the dict of their values.
"""

from collections.abc import Callable, MutableMapping, Sequence
from copy import copy
from typing import TypeVar

import torch
from torch.utils._pytree import tree_leaves, tree_map

T = TypeVar("T")
Arguments = tuple[tuple[object, ...], dict[str, object]]
Written = tuple[dict[object, object], ...]
"""For each mapping what a layer wrote into it, by key."""


def opened(value: object) -> object:
    """Arguments with each mapping as a dict, whose values are leaves of the tree."""
    return tree_map(lambda leaf: dict(leaf) if isinstance(leaf, MutableMapping) else leaf, value)


def with_leaves(function: Callable[[object], object], value: T) -> T:
    """Arguments with every leaf replaced, those in copies of mappings, too."""

    def replaced(leaf: object) -> object:
        if not isinstance(leaf, MutableMapping):
            return function(leaf)
        fresh = copy(leaf)
        for key, held in leaf.items():
            fresh[key] = with_leaves(function, held)
        return fresh

    made: T = tree_map(replaced, value)
    return made


def mappings_in(arguments: Arguments) -> list[MutableMapping[object, object]]:
    """The mappings that are arguments, and those nested in arguments that are none."""
    args, kwargs = arguments
    leaves = tree_leaves((args, [*kwargs.values()]), is_leaf=_is_mapping)
    return [leaf for leaf in leaves if _is_mapping(leaf)]


def contents(mappings: Sequence[MutableMapping[object, object]]) -> Written:
    """What mappings hold now."""
    return tuple(dict(each) for each in mappings)


def written(mappings: Sequence[MutableMapping[object, object]], before: Written) -> Written:
    """What has been put into them since they held `before`."""
    return tuple(
        {key: value for key, value in now.items() if known.get(key) is not value}
        for now, known in zip(mappings, before, strict=True)
    )


def write(entries: Written, mappings: Sequence[MutableMapping[object, object]]) -> None:
    """Put into mappings what a layer of the same kind wrote."""
    for mapping, added in zip(mappings, entries, strict=True):
        mapping.update(added)


def fresh(value: object) -> object:
    """A leaf with storage of its own: each layer of a kind hands on a tensor of its own."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return value


def _is_mapping(value: object) -> bool:
    return isinstance(value, MutableMapping)
