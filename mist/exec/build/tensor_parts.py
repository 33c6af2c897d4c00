"""Parameters of which a tensor-parallel rank has a part, where torch's parallel styles know none.

These are `nn.Linear`'s and `nn.Embedding`'s only. The module keeps its own forward, which finds a
rank's part in the place of the parameter. Some parameters hold several matrices side by side
(queries, keys and values; gates and inputs of experts), and a rank has its part of each. Here their
rows are in another order, those of rank 0 first: then a rank's part is one range of one dimension,
as distributed tensors, FSDP2 and checkpoints need it. In weights and checkpoints they are in the
model's order.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from mist.trace.operations.sized_calls import uncounted

Forward = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class SideBySide:
    """Matrices side by side along a dimension of a parameter, counted from its end.

    `widths`: theirs, in the model's order. Of each of them a rank has 1/`num_ranks`.
    """

    widths: tuple[int, ...]
    dim: int
    num_ranks: int

    def order(self, device: torch.device) -> torch.Tensor:
        """The model's place of each row here."""
        rows = torch.arange(sum(self.widths), device=device).split(self.widths)
        parts = [matrix.unflatten(0, (self.num_ranks, -1)) for matrix in rows]
        return torch.cat(parts, dim=1).flatten()

    def restored(self, whole: torch.Tensor) -> torch.Tensor:
        """A whole tensor of these rows in the model's order."""
        return whole.index_select(whole.dim() + self.dim, self.order(whole.device).argsort())


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRule:
    """The part of a parameter on a rank: 1/t of a dimension, counted from its end.

    `widths`: of the matrices side by side along it; a rank has 1/t of each. `dim` None: all of it,
    which the sum over the ranks shall have once.
    """

    dim: int | None
    widths: tuple[int, ...] = ()


def divide_parts(module: nn.Module, rules: Mapping[str, PartRule], mesh: DeviceMesh) -> None:
    """Give each rank its parts of a module's own parameters (on the meta device), in place."""
    for name, rule in rules.items():
        value = module.get_parameter(name).detach()
        placement = Replicate() if rule.dim is None else Shard(value.dim() + rule.dim)
        divide_parameter(module, name, value, placement, mesh)
    module.forward = partial(_forward, module, module.forward, rules, mesh.size())


def _forward(
    module: nn.Module,
    forward: Forward,
    rules: Mapping[str, PartRule],
    num_ranks: int,
    *args: object,
    **kwargs: object,
) -> torch.Tensor:
    with uncounted():
        parts = {name: _as_read(module, name, rule, num_ranks) for name, rule in rules.items()}
    return with_parts(module, forward, parts, *args, **kwargs)


def _as_read(module: nn.Module, name: str, rule: PartRule, num_ranks: int) -> torch.Tensor:
    part = part_of(module, name)
    return share_of(part, num_ranks) if rule.dim is None else part


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
    owner, attribute = _owner(module, name)
    owner.register_parameter(attribute, nn.Parameter(divided, trained))


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
    owners = {name: _owner(module, name) for name in parts}
    for name, (owner, attribute) in owners.items():
        vars(owner)[attribute] = parts[name]  # is found before the parameter of this name
    try:
        return forward(*args, **kwargs)
    finally:
        for owner, attribute in owners.values():
            del vars(owner)[attribute]


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has a parameter, at or in this one, and its name there."""
    path, _, attribute = name.rpartition(".")
    return module.get_submodule(path), attribute


def in_model_order(value: DTensor, matrices: SideBySide) -> torch.Tensor:
    """A tensor with its rows as the model has them, all of them on every tensor-parallel rank."""
    mesh, placements = value.device_mesh, tuple(value.placements)
    dim = value.dim() + matrices.dim
    # Where FSDP2 divides rows, only tensor-parallel ranks need to exchange; else all is gathered.
    by_rows = dim > 0 and all(not p.is_shard() or p == Shard(0) for p in placements[:-1])
    if not by_rows:
        return matrices.restored(value.full_tensor())
    whole = value.redistribute(placements=(*placements[:-1], Replicate()))
    return DTensor.from_local(
        matrices.restored(whole.to_local()),
        mesh,
        whole.placements,
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )


def read_within(
    target: DTensor, bounds: tuple[slice, ...], matrices: SideBySide
) -> tuple[slice, ...]:
    """What a rank reads of the model's tensor to fill its part: all rows, within the other bounds.

    `bounds`: of its part of a tensor in a rank's order.
    """
    dim = target.dim() + matrices.dim
    return (*bounds[:dim], slice(0, target.shape[dim]), *bounds[dim + 1 :])


def fill_part(
    target: DTensor, read: torch.Tensor, bounds: tuple[slice, ...], matrices: SideBySide
) -> None:
    """Fill a tensor in a rank's order from what was `read_within` its bounds."""
    dim = target.dim() + matrices.dim
    rows = matrices.order(read.device)[bounds[dim]]
    target.to_local().copy_(read.index_select(dim, rows))
