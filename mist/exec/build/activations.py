"""How much of a layer's activation is kept, and where: memory levels, and offload by ratio.

A layer that runs again whole keeps its input. At other levels it is converted (`mist.layers`), or
also keeps the results of attention and of some matrix products. Of what is kept, offload takes a
share of the bytes: as a micro-batch goes through the layers, each tensor that is saved goes to the
host, whole, if the share taken so far leaves room for it. In the backward pass the tensors of one
layer are fetched while the layer behind it runs.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch import nn
from torch._ops import OpOverload
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from mist.exec.build.host_copies import Copy, Swapper, wait_for_all
from mist.layers import convert_layer
from mist.layers.own_checkpoints import PlannedCheckpoint
from mist.plans.memory_levels import CONVERTS, LEVELS
from mist.plans.workload import MemoryLevel

aten = torch.ops.aten

# What the trace counts as products (`mist.trace.operations.flops`), less those in place: a result
# that takes the place of an operand cannot be kept.
PRODUCTS: Final = frozenset(
    {
        aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.addbmm, aten._addmm_activation,
        aten._scaled_mm, aten._grouped_mm, aten.mv, aten.addmv, aten.dot, aten.vdot,
        aten._euclidean_dist, aten.linalg_solve_triangular, aten.convolution,
    }
)  # fmt: skip
ATTENTION_KERNELS: Final = frozenset(
    {
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention,
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._flash_attention_forward,
    }
)


def apply_memory_level(layer: nn.Module, level: MemoryLevel) -> None:
    """Convert or checkpoint a layer as its level says, in place; names of parameters stay."""
    if level in CONVERTS:
        convert_layer(layer, level)
        return
    row, options = LEVELS[level], {}
    if row.product_stride is not None:
        options = {"context_fn": partial(_contexts, row.product_stride)}
    if row.repeats != "nothing":
        # The forward is replaced, not the module: a wrapper would change the names of parameters.
        layer.forward = partial(_checkpointed, layer.forward, options)


def _checkpointed(
    forward: Callable[..., object], options: Mapping[str, Any], *args: object, **kwargs: object
) -> object:
    # The non-reentrant form works with saved-tensor hooks and stops running forward again at the
    # last tensor that the backward pass needs.
    planned = PlannedCheckpoint(partial(forward, **kwargs))
    return checkpoint(planned, *args, use_reentrant=False, **options)


class KeptResults:
    """Which results of one pass through a layer stay: of attention, and of every n-th product.

    A policy of torch's selective checkpointing. It counts products in the first forward pass and
    again, from 0, in the second, so that both choose the same.
    """

    def __init__(self, product_stride: int) -> None:
        self._stride = product_stride
        self._num_products: Counter[bool] = Counter()

    def __call__(
        self, context: SelectiveCheckpointContext, op: OpOverload, *args: object, **kwargs: object
    ) -> CheckpointPolicy:
        """What torch does with the result of this call of an operation."""
        keeps = op.overloadpacket in ATTENTION_KERNELS
        if op.overloadpacket in PRODUCTS:
            number = self._num_products[context.is_recompute]
            self._num_products[context.is_recompute] += 1
            keeps = self._stride > 0 and number % self._stride == 0
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts(product_stride: int) -> object:
    """What torch's checkpointing asks for each time that a layer runs."""
    return create_selective_checkpoint_contexts(KeptResults(product_stride))


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
    arriving: list[Copy] | None = None

    def leave(self) -> None:
        """Make the next computation wait until the copies of this layer are on the host.

        At most two layers are in flight: a device that computes faster than it copies would
        otherwise hold more than planned.
        """
        wait_for_all([saved.out for saved in self.saved])

    def arrive(self) -> None:
        """Make the next computation wait for what was fetched."""
        wait_for_all(self.arriving or ())
        self.arriving = []


class Offloader:
    """Takes a share of the bytes that the layers of a chunk save to the host."""

    def __init__(self, ratio: float, swapper: Swapper) -> None:
        self._ratio = ratio
        self._swapper = swapper
        self._latest: _Pass | None = None
        self._leaving: deque[_Pass] = deque()

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
        while len(self._leaving) > 1:
            self._leaving.popleft().leave()
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
        self._leaving.append(current)
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
        current.arrive()
        saved = packed.saved
        saved.back = saved.back or self._swapper.to_device(saved.out)
        local = saved.back.wait()
        if packed.stride is not None:
            local = local.as_strided(packed.shape, packed.stride)
        return local if packed.of is None else _with_local(packed.of, local)

    def _fetch(self, each: _Pass) -> None:
        if each.arriving is None:
            for saved in each.saved:
                saved.back = self._swapper.to_device(saved.out)
            each.arriving = [saved.back for saved in each.saved if saved.back is not None]
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
