"""Tensor parallelism of transformers' Conv1D: a linear layer that stores [inputs, outputs].

Torch's parallel styles know `nn.Linear`. GPT-2's attention also has queries, keys and values in one
matrix, side by side; a rank has its heads of each. Such a matrix is [inputs, pieces, width] here,
its bias [pieces, width]: then a rank's part is one range of one dimension, as distributed tensors,
FSDP2 and checkpoints need it. In weights and checkpoints it is as the model has it: pieces and
width are one dimension.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

Forward = Callable[[torch.Tensor], torch.Tensor]


def divide_columns(module: nn.Module, pieces: int, mesh: DeviceMesh) -> None:
    """Each rank has 1/t of the outputs, of each piece, in place; what comes in is whole."""
    for name, value in dict(module.named_parameters()).items():
        parts = value.detach().unflatten(-1, (pieces, -1)) if pieces > 1 else value.detach()
        _divide(module, name, parts, Shard(parts.dim() - 1), mesh)
    module.forward = partial(_columns, module, module.forward)


def divide_rows(module: nn.Module, mesh: DeviceMesh) -> None:
    """Each rank has 1/t of the inputs, in place; what comes out is a part of a sum."""
    for name, placement in (("weight", Shard(0)), ("bias", Replicate())):
        _divide(module, name, module.get_parameter(name).detach(), placement, mesh)
    module.forward = partial(_rows, module, module.forward, mesh.size())


def _divide(
    module: nn.Module, name: str, value: torch.Tensor, placement: Placement, mesh: DeviceMesh
) -> None:
    trained = module.get_parameter(name).requires_grad
    divided = distribute_tensor(value, mesh, (placement,), src_data_rank=None)
    module.register_parameter(name, nn.Parameter(divided, trained))


def _columns(module: nn.Module, own: Forward, x: torch.Tensor) -> torch.Tensor:
    weight, bias = _part(module, "weight").flatten(1), _part(module, "bias").flatten()
    return with_parts(module, own, {"weight": weight, "bias": bias}, x)


def _rows(module: nn.Module, own: Forward, num_ranks: int, x: torch.Tensor) -> torch.Tensor:
    bias = _part(module, "bias")
    # The sum over the ranks has the bias once; each of them sees all of its gradient.
    share = bias + (1.0 / num_ranks - 1.0) * bias.detach()
    return with_parts(module, own, {"weight": _part(module, "weight"), "bias": share}, x)


def _part(module: nn.Module, name: str) -> torch.Tensor:
    """This rank's part of a parameter, with a gradient that is divided alike."""
    value: object = module.get_parameter(name)
    assert isinstance(value, DTensor)
    return value.to_local(grad_placements=value.placements)


def with_parts(
    module: nn.Module, own: Forward, parts: Mapping[str, torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """A module's own forward with other tensors in the place of its parameters."""
    vars(module).update(parts)  # is found before the parameters of these names
    try:
        return own(x)
    finally:
        for name in parts:
            del vars(module)[name]


def add_up(
    module: nn.Module, args: object, output: torch.Tensor, *, mesh: DeviceMesh
) -> torch.Tensor:
    """The sum over the ranks, on every rank: a forward hook."""
    parts = DTensor.from_local(output, mesh, (Partial(),), run_check=False)
    return parts.redistribute(placements=(Replicate(),)).to_local()


def joined(value: DTensor) -> torch.Tensor:
    """A tensor in pieces as the model has it, with whole outputs on every tensor-parallel rank."""
    mesh, placements = value.device_mesh, tuple(value.placements)
    by_rows = all(not p.is_shard() or p == Shard(0) for p in placements[:-1])
    if value.dim() == PIECES_OF_WEIGHT and by_rows:
        whole = value.redistribute(placements=(*placements[:-1], Replicate()))
        local = whole.to_local().flatten(1)
        shape = torch.Size((value.shape[0], value.shape[1] * value.shape[2]))
        return DTensor.from_local(
            local, mesh, whole.placements, run_check=False, shape=shape, stride=(shape[1], 1)
        )
    return value.full_tensor().flatten(-2)


def take_apart(target: DTensor, whole: torch.Tensor, bounds: tuple[slice, ...]) -> None:
    """Fill a tensor in pieces from what `joined` gives of it; `bounds`: its part of the whole."""
    local = whole.to_local() if isinstance(whole, DTensor) else whole[bounds[:-2]]
    apart = local.unflatten(-1, tuple(target.shape[-2:]))
    target.to_local().copy_(apart[..., bounds[-2], bounds[-1]])


PIECES_OF_WEIGHT = 3  # dimensions
