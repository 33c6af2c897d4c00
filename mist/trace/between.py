"""Activations between layers of a recorded run, each of which is a graph of its own."""

from collections.abc import Sequence

import torch

from mist.trace.record import key_of


def handed_on(inputs: frozenset[int], value: object) -> object:
    """A result as what follows gets it: not the layer's own storage, unless it was passed on."""
    if isinstance(value, torch.Tensor) and key_of(value) not in inputs:
        return value.detach().clone().requires_grad_(value.requires_grad)
    return cut_off(value)


def activation_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """What a layer works on: the first tensor with a gradient, else the first of floats."""
    floats = [t for t in tensors if t.is_floating_point()]
    return next((t for t in tensors if t.requires_grad), next(iter(floats or tensors), None))


def cut_off(value: object) -> object:
    """A tensor that needs a gradient, cut off from what made it."""
    if isinstance(value, torch.Tensor) and value.requires_grad:
        return value.detach().requires_grad_()
    return value
