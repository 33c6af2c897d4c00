"""What of a layer's inputs decides its cost: layers of a kind that differ in it are distinct."""

import torch
from torch.utils._pytree import tree_flatten

from mist.trace.expressions import Symbols


def input_spec(inputs: object, index: int, symbols: Symbols) -> object:
    """The shapes, types and plain values of inputs. `index`: the layer's number in its list."""
    leaves, tree = tree_flatten(inputs)
    return str(tree), tuple(_leaf_spec(leaf, index, symbols) for leaf in leaves)


def _leaf_spec(leaf: object, index: int, symbols: Symbols) -> object:
    if isinstance(leaf, torch.Tensor):
        return symbols.shape(leaf), leaf.dtype, leaf.requires_grad
    # A layer's own number among its arguments changes no cost.
    is_index = type(leaf) is int and leaf == index
    plain = isinstance(leaf, bool | int | float | str) and not is_index
    return leaf if plain else type(leaf).__name__
