"""How much of a layer's activation is kept, and where: memory levels, and offload by ratio.

`full`: a layer keeps its input and runs again in the backward pass. `selective`: it also keeps the
results of matrix products and attention. Of what is kept, offload takes a share of the bytes: as a
micro-batch goes through the layers, each tensor that is saved goes to the host, whole, if the share
taken so far leaves room for it. In the backward pass the tensors of one layer are fetched while the
layer behind it runs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import nn
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from mist.exec.build.host_copies import Copy, Swapper
from mist.layers import convert_layer
from mist.layers.own_checkpoints import PlannedCheckpoint
from mist.plans.memory_levels import CONVERTS
from mist.plans.workload import MemoryLevel

aten = torch.ops.aten

SAVED_OPS: Final = frozenset(
    {
        aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._flash_attention_forward.default,
    }
)  # fmt: skip


def apply_memory_level(layer: nn.Module, level: MemoryLevel) -> None:
    """Convert or checkpoint a layer as its level says, in place; names of parameters stay."""
    if level in CONVERTS:
        convert_layer(layer, level)
        return
    options = CHECKPOINT_OPTIONS[level]
    if options is not None:
        # The forward is replaced, not the module: a wrapper would change the names of parameters.
        layer.forward = partial(_checkpointed, layer.forward, options)


def _checkpointed(
    forward: Callable[..., object], options: Mapping[str, Any], *args: object, **kwargs: object
) -> object:
    # The non-reentrant form works with saved-tensor hooks and stops running forward again at the
    # last tensor that the backward pass needs.
    planned = PlannedCheckpoint(partial(forward, **kwargs))
    return checkpoint(planned, *args, use_reentrant=False, **options)


def _policy(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINT_OPTIONS: Final[Mapping[MemoryLevel, Mapping[str, Any] | None]] = MappingProxyType(
    {
        MemoryLevel.NONE: None,
        MemoryLevel.SELECTIVE: {
            "context_fn": partial(create_selective_checkpoint_contexts, _policy)
        },
        MemoryLevel.FULL: {},
    }
)
"""What each level asks of torch's checkpointing; None: nothing runs again."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Saved:
    """What is on the host, and its copy on the way back."""

    out: Copy
    back: Copy | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _View:
    """A saved tensor that is on the host: one shape of it, as some layers save several.

    `stride`: None where what is on the host is that tensor alone. `of`: the DTensor, without memory
    of its own, whose local part it is.
    """

    saved: _Saved
    shape: torch.Size
    stride: tuple[int, ...] | None
    of: DTensor | None


@dataclass(slots=True, kw_only=True, eq=False)
class _Pass:
    """What one layer put on the host in one forward pass; `before`: what ran before it.

    `known`: what was met already: autograd saves some tensors more than once, and in two shapes.
    """

    before: "_Pass | None"
    parameters: frozenset[int]
    saved_bytes: int
    offloaded_bytes: int
    saved: list[_Saved] = field(default_factory=list)
    known: dict[object, tuple[StorageWeakRef, _Saved | None]] = field(default_factory=dict)
    fetched: bool = False

    def leave(self) -> None:
        """Make the next computation wait until the copies of this layer are on the host.

        At most two layers are in flight: a device that computes faster than it copies would
        otherwise hold more than planned.
        """
        if self.saved:
            self.saved[-1].out.wait()  # copies end in the order in which they began


class Offloader:
    """Takes a share of the bytes that the layers of a chunk save to the host."""

    def __init__(self, ratio: float, swapper: Swapper) -> None:
        self._ratio = ratio
        self._swapper = swapper
        self._latest: _Pass | None = None

    def attach(self, layer: nn.Module) -> None:
        """Offload what this layer saves, its checkpoint input included, in place."""
        layer.forward = partial(self._run, layer, layer.forward)

    def start(self) -> None:
        """A micro-batch begins: nothing ran before its first layer."""
        self._latest = None

    def _run(
        self, layer: nn.Module, forward: Callable[..., object], *args: object, **kwargs: object
    ) -> object:
        # The chain of passes is the order of the layers, which a backward pass follows in reverse.
        before = self._latest
        if before is not None and before.before is not None:
            before.before.leave()
        current = _Pass(
            before=before,
            parameters=frozenset(_storage(p) for p in layer.parameters()),
            saved_bytes=before.saved_bytes if before else 0,
            offloaded_bytes=before.offloaded_bytes if before else 0,
        )
        # Outside of the checkpoint, which `apply_memory_level` put into the forward: there autograd
        # saves the input of the layer, and the hooks see it as any other tensor.
        with saved_tensors_hooks(partial(self._pack, current), partial(self._unpack, current)):
            output = forward(*args, **kwargs)
        # Weak references keep the identities of freed storages from being used again; behind the
        # layer nothing is looked up any more.
        current.known.clear()
        self._latest = current
        return output

    def _pack(self, current: _Pass, tensor: torch.Tensor) -> torch.Tensor | _View:
        local = _local(tensor)
        # A parameter that a layer saves belongs to FSDP2, which frees and gathers it.
        if not local.is_floating_point() or _storage(local) in current.parameters:
            return tensor
        storage = StorageWeakRef(local.untyped_storage())
        whole = _is_whole(local)
        part = (local.storage_offset(), local.shape, local.stride())
        # A copy of a whole storage has its strides, so every view of it can be made from one copy.
        # Of a storage that is saved in part, each part has a copy.
        key = (storage.cdata, local.dtype, None if whole else part)
        if key not in current.known:
            current.known[key] = (storage, self._offloaded_copy(current, local))
        saved = current.known[key][1]
        if saved is None:
            return tensor
        of = None
        if isinstance(tensor, DTensor):
            of = _with_local(tensor, local.detach().to("meta"))
        return _View(
            saved=saved,
            shape=local.shape,
            stride=local.stride() if whole else None,
            of=of,
        )

    def _offloaded_copy(self, current: _Pass, local: torch.Tensor) -> _Saved | None:
        """The copy of a tensor on the host, if there is room for it in the share."""
        size = local.numel() * local.element_size()
        current.saved_bytes += size
        if current.offloaded_bytes + size > round(self._ratio * current.saved_bytes):
            return None
        current.offloaded_bytes += size
        saved = _Saved(out=self._swapper.to_host(local.detach()))
        current.saved.append(saved)
        return saved

    def _unpack(self, current: _Pass, packed: torch.Tensor | _View) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        self._fetch(current)
        # While this layer runs backward, the tensors of the layer before it are on their way in.
        if current.before is not None:
            self._fetch(current.before)
        saved = packed.saved
        saved.back = saved.back or self._swapper.to_device(saved.out)
        local = saved.back.wait()
        if packed.stride is not None:
            local = local.as_strided(packed.shape, packed.stride)
        return local if packed.of is None else _with_local(packed.of, local)

    def _fetch(self, each: _Pass) -> None:
        if not each.fetched:
            each.fetched = True
            for saved in each.saved:
                saved.back = self._swapper.to_device(saved.out)
            each.saved.clear()


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether it is all of its storage, each place once: then a copy has the same strides."""
    whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
    return whole and is_non_overlapping_and_dense_or_false(tensor)


def _storage(tensor: torch.Tensor) -> int:
    return int(_local(tensor).untyped_storage()._cdata)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard; a collective that still runs is waited for."""
    shard = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return shard.wait() if isinstance(shard, AsyncCollectiveTensor) else shard


def _with_local(tensor: DTensor, local: torch.Tensor) -> DTensor:
    return DTensor(local, tensor._spec, requires_grad=False)
