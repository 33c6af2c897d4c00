"""Initial weights that depend on a seed and the names of parameters, not on the layout.

Each module with parameters of its own initialises a whole copy of them on the CPU, as its class
does (`_init_weights` of Hugging Face, `reset_parameters` of torch), from a generator seeded by the
seed and the module's name; each rank keeps its shards. One module is whole at a time.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Final, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from mist.exec.parts import ONE_PIECE, Pieces, read_within, take_apart

SPREAD: Final = 0.02  # of a matrix whose module does not say how it is initialised (GPT-2's)


def seed_of(seed: int, *words: object) -> int:
    """A seed for one purpose, from the seed of the run."""
    text = "\n".join(map(str, (seed, *words)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def whole_values(model: nn.Module, module_name: str, seed: int) -> Mapping[str, torch.Tensor]:
    """The initial values of a module's own parameters, by their names in it.

    `model`: the whole model on the meta device; it is left as it was.
    """
    module = model.get_submodule(module_name)
    empty = dict(module.named_parameters(recurse=False))
    for name, value in empty.items():
        module._parameters[name] = nn.Parameter(torch.empty(value.shape, dtype=value.dtype))
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed_of(seed, "weights", module_name))
            _initialise(model, module)
        return {name: value.detach() for name, value in module.named_parameters(recurse=False)}
    finally:
        for name, value in empty.items():
            module._parameters[name] = value


def _initialise(model: nn.Module, module: nn.Module) -> None:
    """As the model says, as the module says, or ones for scales, zeros for shifts, else normal."""
    for name, value in module.named_parameters(recurse=False):
        if value.dim() > 1:
            value.normal_(std=SPREAD)
        else:
            value.fill_(0.0 if "bias" in name else 1.0)
    own: Callable[[], None] | None = getattr(module, "reset_parameters", None)
    if own is not None:
        own()
    models: Callable[[nn.Module], None] | None = getattr(model, "_init_weights", None)
    if models is not None:
        models(module)


class Whole(Protocol):
    """All of a parameter's value, in memory or in a file: indexing gives the part within bounds."""

    def __getitem__(self, bounds: tuple[slice, ...], /) -> torch.Tensor: ...


def fill(parameter: torch.Tensor, value: Whole, *, pieces: Pieces = ONE_PIECE) -> None:
    """Give a parameter its part of a whole value, which every rank can read.

    `pieces`: how many matrices side by side it keeps apart.
    """
    target = parameter.detach()
    if isinstance(target, DTensor) and pieces.count > 1:
        bounds = bounds_of(target)
        take_apart(target, value[read_within(target, bounds, pieces)], bounds, pieces)
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
            size = -(-len(whole) // mesh.size(axis))
            bounds[placement.dim] = whole[place[axis] * size : (place[axis] + 1) * size]
    return tuple(slice(each.start, each.stop) for each in bounds)
