"""Parameters of which a tensor-parallel rank has a part, where torch's parallel styles know none.

These are `nn.Linear`'s and `nn.Embedding`'s only. The module keeps its own forward, which finds a
rank's part in the place of the parameter. Some parameters hold several matrices side by side
(queries, keys and values; gates and inputs of experts), and a rank has its part of each. Such a
dimension is two here, pieces and width: then a rank's part is one range of one dimension, as
distributed tensors, FSDP2 and checkpoints need it. In weights and checkpoints it is as the model
has it: one dimension.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

Forward = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """How many matrices lie side by side along a dimension of the model's, counted from its end."""

    count: int
    dim: int


ONE_PIECE: Final = Pieces(count=1, dim=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRule:
    """The part of a parameter on a rank: 1/t of a dimension, counted from the end, of each piece.

    `dim` None: all of it, which the sum over the ranks shall have once.
    """

    dim: int | None
    num_pieces: int = 1


def divide_parts(module: nn.Module, rules: Mapping[str, PartRule], mesh: DeviceMesh) -> None:
    """Give each rank its parts of a module's own parameters, in place."""
    for name, rule in rules.items():
        value = module.get_parameter(name).detach()
        if rule.dim is None:
            divide_parameter(module, name, value, Replicate(), mesh)
            continue
        if rule.num_pieces > 1:
            value = value.unflatten(rule.dim, (rule.num_pieces, -1))
        divide_parameter(module, name, value, Shard(value.dim() + rule.dim), mesh)
    module.forward = partial(_forward, module, module.forward, rules, mesh.size())


def _forward(
    module: nn.Module,
    forward: Forward,
    rules: Mapping[str, PartRule],
    num_ranks: int,
    *args: object,
    **kwargs: object,
) -> torch.Tensor:
    parts = {name: _as_read(module, name, rule, num_ranks) for name, rule in rules.items()}
    return with_parts(module, forward, parts, *args, **kwargs)


def _as_read(module: nn.Module, name: str, rule: PartRule, num_ranks: int) -> torch.Tensor:
    part = part_of(module, name)
    if rule.dim is None:
        return share_of(part, num_ranks)
    return part.flatten(rule.dim - 1, rule.dim) if rule.num_pieces > 1 else part


def share_of(value: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """1/t of a value, so that the sum over the ranks has it once; its gradient stays whole."""
    # The detached term changes the value, not the gradient.
    return value + (1.0 / num_ranks - 1.0) * value.detach()


def divide_parameter(
    module: nn.Module, name: str, value: torch.Tensor, placement: Placement, mesh: DeviceMesh
) -> None:
    """Replace a parameter by this rank's part of a value."""
    trained = module.get_parameter(name).requires_grad
    divided = distribute_tensor(value, mesh, (placement,), src_data_rank=None)
    module.register_parameter(name, nn.Parameter(divided, trained))


def part_of(module: nn.Module, name: str) -> torch.Tensor:
    """This rank's part of a parameter, with a gradient that is divided alike."""
    value: object = module.get_parameter(name)
    assert isinstance(value, DTensor)
    return value.to_local(grad_placements=value.placements)


def with_parts(
    module: nn.Module,
    forward: Forward,
    parts: Mapping[str, torch.Tensor],
    *args: object,
    **kwargs: object,
) -> torch.Tensor:
    """A module's own forward with other tensors in the place of its parameters."""
    vars(module).update(parts)  # is found before the parameters of these names
    try:
        return forward(*args, **kwargs)
    finally:
        for name in parts:
            del vars(module)[name]


def merge_pieces(value: DTensor, pieces: Pieces) -> torch.Tensor:
    """A tensor in pieces as the model has it, with whole outputs on every tensor-parallel rank."""
    mesh, placements = value.device_mesh, tuple(value.placements)
    dim = _first_of(value, pieces)
    # Where FSDP2 divides rows, only tensor-parallel ranks need to exchange; else all is gathered.
    by_rows = dim > 0 and all(not p.is_shard() or p == Shard(0) for p in placements[:-1])
    if not by_rows:
        return value.full_tensor().flatten(dim, dim + 1)
    whole = value.redistribute(placements=(*placements[:-1], Replicate()))
    like = torch.empty(value.shape, device="meta").flatten(dim, dim + 1)
    return DTensor.from_local(
        whole.to_local().flatten(dim, dim + 1),
        mesh,
        whole.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def read_within(target: DTensor, bounds: tuple[slice, ...], pieces: Pieces) -> tuple[slice, ...]:
    """What a rank reads of the model's tensor to fill its part: all of what lies side by side.

    `bounds`: of its part of a tensor in pieces.
    """
    dim = _first_of(target, pieces)
    width = target.shape[dim] * target.shape[dim + 1]
    return (*bounds[:dim], slice(0, width), *bounds[dim + 2 :])


def take_apart(
    target: DTensor, read: torch.Tensor, bounds: tuple[slice, ...], pieces: Pieces
) -> None:
    """Fill a tensor in pieces from what was `read_within` its bounds."""
    dim = _first_of(target, pieces)
    apart = read.unflatten(dim, tuple(target.shape[dim : dim + 2]))
    index = (*(slice(None),) * dim, *bounds[dim : dim + 2])
    target.to_local().copy_(apart[index])


def _first_of(value: torch.Tensor, pieces: Pieces) -> int:
    """The dimension of a tensor in pieces that counts them; the next one is their width."""
    return value.dim() + pieces.dim - 1
