"""How many bytes an operation moves, and which class of the device's bandwidth it reaches.

Default: everything read plus everything written, each tensor once, as a pointwise operation. A row
of `READS` or `WRITES` says what an operation leaves untouched: a gather reads the rows it picks,
not the table. Views and allocations move nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils._pytree import tree_leaves

from mist.facts import Traffic
from mist.trace.expr import Size, num_bytes
from mist.trace.flops import Call
from mist.trace.kernels import RMS_NORM, RMS_NORM_BACKWARD

aten = torch.ops.aten

CLASSES: Final[Mapping[OpOverloadPacket, Traffic]] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                aten.sum, aten.mean, aten.var, aten.var_mean, aten.std, aten.amax, aten.amin,
                aten.max, aten.min, aten.argmax, aten.argmin, aten.norm, aten.prod, aten.any,
                aten.all, aten.cumsum, aten.logsumexp, aten.linalg_vector_norm,
            ),
            Traffic.REDUCTION,
        ),
        **dict.fromkeys(
            (
                aten.native_layer_norm, RMS_NORM, aten.native_group_norm,
                aten.native_batch_norm,
            ),
            Traffic.NORM_FORWARD,
        ),
        **dict.fromkeys(
            (
                aten.native_layer_norm_backward, RMS_NORM_BACKWARD,
                aten.native_group_norm_backward, aten.native_batch_norm_backward,
            ),
            Traffic.NORM_BACKWARD,
        ),
        **dict.fromkeys(
            (
                aten._softmax, aten._softmax_backward_data, aten._safe_softmax,
                aten._log_softmax, aten._log_softmax_backward_data,
            ),
            Traffic.SOFTMAX,
        ),
        **dict.fromkeys(
            (
                aten.embedding, aten.embedding_dense_backward, aten.gather, aten.scatter,
                aten.scatter_add, aten.index, aten.index_put, aten._index_put_impl,
                aten.index_select, aten.index_add, aten.nll_loss_forward, aten.nll_loss_backward,
                aten.topk, aten.sort,
            ),
            Traffic.GATHER,
        ),
    }
)  # fmt: skip


def _tensors(value: object) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def _bytes(value: object) -> Size:
    """Bytes of the distinct tensors in a value."""
    return sum((num_bytes(t) for t in {id(t): t for t in _tensors(value)}.values()), start=0)


def _arguments_bytes(call: Call) -> Size:
    return _bytes(tuple(call.arguments.values()))


def _picked_bytes(table: str) -> Callable[[Call], Size]:
    """Of `table` only what the result holds is read; of the rest everything."""

    def reads(call: Call) -> Size:
        rest = {name: value for name, value in call.arguments.items() if name != table}
        return _bytes(tuple(rest.values())) + num_bytes(call.first_out)

    return reads


def _only(*names: str) -> Callable[[Call], Size]:
    return lambda call: _bytes(tuple(call.arguments[name] for name in names))


def _one_per_target(call: Call) -> Size:
    target = call.tensor("target")
    return num_bytes(target) + target.numel() * call.tensor("self").element_size()


READS: Final[Mapping[OpOverloadPacket, Callable[[Call], Size]]] = MappingProxyType(
    {
        aten.embedding: _picked_bytes("weight"),
        aten.gather: _picked_bytes("self"),
        aten.index_select: _picked_bytes("self"),
        aten.index: _picked_bytes("self"),
        aten.nll_loss_forward: _one_per_target,
        aten.nll_loss_backward: _only("target"),
        aten.copy_: _only("src"),
        aten.fill_: _only(),
        aten.zero_: _only(),
        aten.zeros_like: _only(),
        aten.ones_like: _only(),
        aten.full_like: _only(),
        aten.new_zeros: _only(),
        aten.new_ones: _only(),
        aten.new_full: _only(),
    }
)

ALLOCATIONS: Final = frozenset(
    {
        aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,
        aten.detach, aten.alias, aten._unsafe_view, aten._reshape_alias, aten.lift_fresh,
    }
)  # fmt: skip


def moves_bytes(func: OpOverload, out: object) -> bool:
    """Whether a call does work on the device at all: it is no view, allocation or size query."""
    free = func.is_view or func.overloadpacket in ALLOCATIONS
    return not free and any(True for _ in _tensors(out))


def read_bytes(call: Call) -> Size:
    """Bytes that a call reads."""
    return READS.get(call.func.overloadpacket, _arguments_bytes)(call)


def written_bytes(call: Call) -> Size:
    """Bytes that a call writes."""
    return _bytes(call.out)


def traffic_class(func: OpOverload) -> Traffic:
    """The class of an operation, by its table row."""
    return CLASSES.get(func.overloadpacket, Traffic.POINTWISE)
