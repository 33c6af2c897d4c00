"""ZeRO levels of a stage, as FSDP2 flags.

| level | parameters                    | gradients                                      |
|-------|-------------------------------|------------------------------------------------|
| 0     | replicated                    | summed over micro-batches, reduced at the end  |
| 1     | gathered once per step        | as in 0, then scattered                        |
| 2     | gathered once per step        | reduce-scattered in every micro-batch          |
| 3     | gathered whenever a layer runs| reduce-scattered in every micro-batch          |

Copies of what is divided (HSDP, a mesh of two axes) add up their gradients at the end of a step.

Parameters are kept and reduced in fp32, computed with in the plan's precision. Losses are divided
by all samples of the step, so gradients are summed over ranks, not averaged.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard

from mist.exec.build.adamw import local
from mist.exec.build.torch_versions import param_groups
from mist.plans.workload import Precision

MAX_PADDING: Final = 1 / 16  # of a parameter; dividing another dimension costs a copy more
COMPUTE = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16}
MASTER = dict.fromkeys(COMPUTE, torch.float32)  # parameters and what is reduced


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroSharding:
    """How states are divided. `on_host`: layers (by id) whose shards live in host memory.

    `idle`: how many of the first layers have no backward pass, as nothing up to them is trained.
    """

    zero: int
    precision: Precision
    on_host: frozenset[int] = frozenset()
    idle: int = 0


def shard(
    root: nn.Module, layers: Sequence[nn.Module], mesh: DeviceMesh, level: ZeroSharding
) -> None:
    """Make each layer, and what remains of `root`, a group of FSDP2, in place."""
    policy = MixedPrecisionPolicy(
        param_dtype=COMPUTE[level.precision], reduce_dtype=MASTER[level.precision]
    )
    # Layers first: the group of the root takes the parameters that no group has yet.
    for module in (*layers, root):
        if level.zero == 0:
            replicate(module, mesh=mesh, mp_policy=policy)
            continue
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            # The root (embedding, head) runs backward right behind its forward pass: resharding
            # would gather it twice.
            reshard_after_forward=level.zero == 3 and module is not root,
            offload_policy=_offload(mesh, on_host=id(module) in level.on_host),
            # Only the last axis of the mesh divides; along dp_replicate ranks hold copies.
            shard_placement_fn=partial(divided_dim, num_ranks=mesh.size(mesh.ndim - 1)),
        )
    for group in groups(root):
        # Sums on the wire and no division behind: FSDP2 would average over the ranks.
        group.set_force_sum_reduction_for_comms(True)
        group.set_gradient_divide_factor(1.0)
    _prefetch([*layers[level.idle :], root])


def divided_dim(parameter: nn.Parameter, *, num_ranks: int) -> Shard | None:
    """The dimension that ranks divide; None: the first one, as FSDP2 does.

    FSDP2 pads the first dimension to a multiple of the ranks. Eight experts on 64 ranks would take
    the memory, and the traffic, of 64: where another dimension divides evenly, that is taken.
    """
    shape = local(parameter).shape
    if not shape or -shape[0] % num_ranks <= MAX_PADDING * shape[0]:
        return None
    even = (dim for dim in range(1, len(shape)) if shape[dim] % num_ranks == 0)
    dim = next(even, None)
    return None if dim is None else Shard(dim)


def _prefetch(in_order: Sequence[nn.Module]) -> None:
    """Each group gathers the one that runs backward after it, and the first of these one none.

    Left to itself FSDP2 goes back through forward passes, of all micro-batches: behind the first
    layer it then gathers the last one, in vain after the last micro-batch.
    """
    for group, following in zip(in_order, (in_order[0], *in_order), strict=False):
        assert isinstance(group, FSDPModule)
        assert isinstance(following, FSDPModule)
        group.set_modules_to_backward_prefetch([following])


def _offload(mesh: DeviceMesh, *, on_host: bool) -> OffloadPolicy:
    return CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if on_host else OffloadPolicy()


def groups(root: nn.Module) -> Iterator[FSDPModule]:
    """The root and the layers that FSDP2 manages."""
    return (module for module in root.modules() if isinstance(module, FSDPModule))


def begin_backward(root: nn.Module, *, zero: int, last: bool) -> None:
    """Set what happens to parameters and gradients in the coming backward pass.

    `last`: of the step. Level 3 drops gathered parameters after each backward pass, the others
    after the last one.
    """
    assert isinstance(root, FSDPModule)
    # Behind the last backward pass FSDP2 waits for its reductions and forgets its prefetching
    # order.
    root.set_is_last_backward(last)
    root.set_reshard_after_backward(last or zero == 3)
    # Below level 2 gradients add up in fp32, not sharded, until the last micro-batch reduces them.
    root.set_requires_gradient_sync(last or zero >= 2)
    # Copies of the states (HSDP) add up once per step, whatever the level scatters before.
    root.set_requires_all_reduce(last)


@contextmanager
def gathered_for_all_calls(root: nn.Module) -> Iterator[None]:
    """Within: a backward pass, in which a layer that was called several times is gathered once.

    FSDP2 drops what is gathered behind each call that went back, and gathers it for the next one.
    It counts calls until the last backward pass of a step, so those of each micro-batch are
    forgotten here: one call in each of several micro-batches is not several calls.
    """
    again = [
        module
        for module in groups(root)
        if any(
            group.reshard_after_backward and len(group._post_forward_indices) > 1
            for group in param_groups(module)
        )
    ]
    for module in again:
        module.set_reshard_after_backward(False, recurse=False)
    yield
    for module in groups(root):
        for group in param_groups(module):
            group._post_forward_indices.clear()
    for module in again:
        module.reshard()
