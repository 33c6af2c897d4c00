"""What ranks add up after the backward passes of a step: shared gradients, and the global norm."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from mist.exec.build.adamw import local


@dataclass(frozen=True, slots=True, kw_only=True)
class Tied:
    """A parameter that two stages hold, and the group of this rank with its partner there."""

    parameter: nn.Parameter
    group: dist.ProcessGroup


def add_partial(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> None:
    """Sum gradients of undivided parameters over tensor-parallel ranks, all in one collective."""
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    if not grads:
        return
    # Norms and biases are small and many: in one buffer they cost one latency.
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat, group=mesh.get_group())
    parts = flat.split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [p.view_as(g) for p, g in zip(parts, grads, strict=True)])


def add_tied(tied: Sequence[Tied]) -> None:
    """Sum the gradients of parameters that the first and the last stage share."""
    for each in tied:
        if each.parameter.grad is not None:
            dist.all_reduce(local(each.parameter.grad), group=each.group)


def global_norm(
    parameters: Mapping[str, nn.Parameter], tp: int, tied: Sequence[Tied], device: torch.device
) -> torch.Tensor:
    """The norm of the gradient of the whole model, on every rank.

    Each rank adds up its shards; what several ranks hold counts once.
    """
    shared = {id(each.parameter) for each in tied}
    by_copies: dict[tuple[torch.device, int], list[torch.Tensor]] = {}
    for parameter in parameters.values():
        if parameter.grad is not None:
            # After add_tied both stages have the whole gradient of a tied parameter.
            copies = _copies(parameter, tp) * (2 if id(parameter) in shared else 1)
            grad = at_least_fp32(local(parameter.grad))
            by_copies.setdefault((grad.device, copies), []).append(grad)
    total = torch.zeros((), device=device)
    for (_, copies), grads in by_copies.items():  # those in host memory cross once, as one number
        norms = torch.stack(torch._foreach_norm(grads))
        total += (norms.square().sum() / copies).to(device)
    # Over the default group, which has shards, copies and stages: a rank without gradients joins,
    # too.
    dist.all_reduce(total)
    return total.sqrt()


def _copies(parameter: nn.Parameter, tp: int) -> int:
    """How many ranks of the stage hold the same shard."""
    if not isinstance(parameter, DTensor):
        return tp
    mesh, copies = parameter.device_mesh, 1
    for axis, placement in enumerate(parameter.placements):
        copies *= mesh.size(axis) if isinstance(placement, Replicate) else 1
    return copies * (1 if "tp" in (mesh.mesh_dim_names or ()) else tp)


def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a precision that sums can be kept in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def clip_scale(norm: torch.Tensor, max_norm: float | None) -> torch.Tensor:
    """What gradients are multiplied by, as torch.nn.utils.clip_grad_norm_ does."""
    return torch.ones_like(norm) if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
