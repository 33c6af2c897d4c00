"""ZeRO levels of a stage, as FSDP2 flags.

| level | parameters                    | gradients                                      |
|-------|-------------------------------|------------------------------------------------|
| 0     | replicated                    | summed over micro-batches, reduced at the end  |
| 1     | gathered once per step        | as in 0, then scattered                        |
| 2     | gathered once per step        | reduce-scattered in every micro-batch          |
| 3     | gathered whenever a layer runs| reduce-scattered in every micro-batch          |

Parameters are kept and reduced in fp32, computed with in the plan's precision. Losses are divided
by all samples of the step, so gradients are summed over ranks, not averaged.
"""

from collections.abc import Iterable, Iterator

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

from mist.spec import Precision

COMPUTE = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16}


def shard(  # noqa: PLR0913 - what is divided, and how
    root: nn.Module,
    layers: Iterable[nn.Module],
    mesh: DeviceMesh,
    *,
    zero: int,
    precision: Precision,
    on_host: frozenset[int] = frozenset(),
) -> None:
    """Make each layer, and what remains of `root`, a group of FSDP2, in place.

    `on_host`: layers (by id) whose shards of parameters and gradients live in host memory.
    """
    policy = MixedPrecisionPolicy(param_dtype=COMPUTE[precision], reduce_dtype=torch.float32)
    for layer in layers:
        if zero == 0:
            replicate(layer, mesh=mesh, mp_policy=policy)
        else:
            fully_shard(
                layer,
                mesh=mesh,
                mp_policy=policy,
                reshard_after_forward=zero == 3,
                offload_policy=_offload(mesh, on_host=id(layer) in on_host),
            )
    if zero == 0:
        replicate(root, mesh=mesh, mp_policy=policy)
    else:
        fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for group in groups(root):
        group.set_force_sum_reduction_for_comms(True)
        group.set_gradient_divide_factor(1.0)


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
    root.set_is_last_backward(last)
    root.set_reshard_after_backward(last or zero == 3)
    root.set_requires_gradient_sync(last or zero >= 2)


def drop_gathered(root: nn.Module) -> None:
    """Free what is still gathered of the parameters."""
    for group in groups(root):
        group.reshard()
