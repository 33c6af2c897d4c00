"""How many bytes an operation moves, and which class of the device's bandwidth it reaches.

Default: everything read plus everything written, each tensor once, as a pointwise operation. A row
of `READS` or `WRITES` says what an operation leaves untouched: a gather reads the rows it picks,
not the table. Views and allocations move nothing.
"""

from collections.abc import Callable, Mapping
from math import prod
from types import MappingProxyType
from typing import Final

import torch
from torch._ops import OpOverload, OpOverloadPacket

from mist.model.summary import Traffic
from mist.trace.dispatch_call import Call, tensors_in
from mist.trace.expressions import Size, num_bytes
from mist.trace.operations.kernels import RMS_NORM, RMS_NORM_BACKWARD

aten = torch.ops.aten


def _elements(name: str) -> Callable[[Call], Size]:
    """As many places as an argument has elements."""
    return lambda call: call.tensor(name).numel()


def _indexed(call: Call) -> Size:
    """Places that one index per dimension names, however small the values are.

    A mask stands for the dimensions that it has, and names at most all of them.
    """
    x, indices = call.tensor("self"), call.arguments["indices"]
    assert isinstance(indices, list | tuple)
    rest: list[Size] = []
    shapes: list[tuple[Size, ...]] = []
    dim = 0
    for index in indices:
        masks = index is not None and index.dtype is torch.bool
        if index is None:
            rest.append(x.shape[dim])
        else:
            shapes.append((index.numel(),) if masks else tuple(index.shape))
        dim += index.dim() if masks else 1
    return prod((*rest, *torch.broadcast_shapes(*shapes), *x.shape[dim:]))


def _slices(call: Call) -> Size:
    """Places of whole slices along one dimension."""
    x, dim = call.tensor("self"), call.arguments["dim"]
    assert isinstance(dim, int)
    others = prod(size for i, size in enumerate(x.shape) if i != dim % x.dim())
    return call.tensor("index").numel() * others


# What writes only the places that an index names, in place or into a copy of the whole.
PLACES: Final[Mapping[OpOverloadPacket, Callable[[Call], Size]]] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                aten.scatter, aten.scatter_, aten.scatter_add, aten.scatter_add_,
                aten.scatter_reduce, aten.scatter_reduce_, aten.put, aten.put_,
            ),
            _elements("index"),
        ),
        **dict.fromkeys(
            (
                aten.index_add, aten.index_add_, aten.index_copy, aten.index_copy_,
                aten.index_reduce, aten.index_reduce_, aten.masked_scatter, aten.masked_scatter_,
            ),
            _elements("source"),
        ),
        **dict.fromkeys((aten.index_put, aten.index_put_, aten._index_put_impl_), _indexed),
        **dict.fromkeys((aten.index_fill, aten.index_fill_), _slices),
    }
)  # fmt: skip

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
                aten.native_batch_norm, aten._native_batch_norm_legit,
                aten._batch_norm_with_update, aten.cudnn_batch_norm,
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
                aten.embedding, aten.embedding_dense_backward, aten._embedding_bag,
                aten._embedding_bag_forward_only, aten._embedding_bag_backward, aten.gather,
                aten.take, aten.index, aten.index_select, aten.nll_loss_forward,
                aten.nll_loss_backward, aten.nll_loss2d_forward, aten.nll_loss2d_backward,
                aten.topk, aten.sort, *PLACES,
            ),
            Traffic.GATHER,
        ),
    }
)  # fmt: skip


def _bytes(value: object) -> Size:
    """Bytes of the distinct tensors in a value."""
    return sum((num_bytes(t) for t in {id(t): t for t in tensors_in(value)}.values()), start=0)


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


def _bag_rows(call: Call) -> Size:
    """A row for each index, and everything but the table."""
    weight = call.tensor("weight")
    rest = {name: value for name, value in call.arguments.items() if name != "weight"}
    rows = call.tensor("indices").numel() * weight.shape[1]
    return _bytes(tuple(rest.values())) + rows * weight.element_size()


def _touched(call: Call) -> Size:
    """Bytes of the places that an index names."""
    return PLACES[call.func.overloadpacket](call) * call.tensor("self").element_size()


def _in_place(call: Call) -> bool:
    return call.func._schema.is_mutable


def _scatter_reads(call: Call) -> Size:
    """Index and source; the places (read, changed, written); out of place the whole as well."""
    arguments = {name: value for name, value in call.arguments.items() if name != "self"}
    whole = 0 if _in_place(call) else num_bytes(call.tensor("self"))
    return _bytes(tuple(arguments.values())) + _touched(call) + whole


def _scatter_writes(call: Call) -> Size:
    return _touched(call) + (0 if _in_place(call) else num_bytes(call.first_out))


def _passes(call: Call) -> int:
    """A Fourier transform reads and writes everything once for each dimension."""
    dims = call.arguments["dim"]
    assert isinstance(dims, list | tuple)
    return len(dims)


def _fft_reads(call: Call) -> Size:
    return num_bytes(call.tensor("self")) + (_passes(call) - 1) * num_bytes(call.first_out)


def _fft_writes(call: Call) -> Size:
    return _passes(call) * num_bytes(call.first_out)


# Of their input these need the shape alone.
OF_GRADIENT: Final = (
    aten.avg_pool2d_backward, aten.avg_pool3d_backward, aten._adaptive_avg_pool2d_backward,
    aten._adaptive_avg_pool3d_backward, aten.reflection_pad1d_backward,
    aten.reflection_pad2d_backward, aten.reflection_pad3d_backward,
    aten.replication_pad1d_backward, aten.replication_pad2d_backward,
    aten.replication_pad3d_backward,
)  # fmt: skip
OF_GRADIENT_AND_INDICES: Final = (
    aten.max_pool2d_with_indices_backward, aten.max_pool3d_with_indices_backward,
    aten.adaptive_max_pool2d_backward, aten.adaptive_max_pool3d_backward,
)  # fmt: skip

READS: Final[Mapping[OpOverloadPacket, Callable[[Call], Size]]] = MappingProxyType(
    {
        aten.embedding: _picked_bytes("weight"),
        aten._embedding_bag: _bag_rows,
        aten._embedding_bag_forward_only: _bag_rows,
        aten.gather: _picked_bytes("self"),
        aten.index_select: _picked_bytes("self"),
        aten.index: _picked_bytes("self"),
        aten.take: _picked_bytes("self"),
        aten.nll_loss_forward: _one_per_target,
        aten.nll_loss_backward: _only("target"),
        aten.nll_loss2d_forward: _one_per_target,
        aten.nll_loss2d_backward: _only("target"),
        aten._fft_c2c: _fft_reads,
        aten._fft_r2c: _fft_reads,
        aten._fft_c2r: _fft_reads,
        **dict.fromkeys(PLACES, _scatter_reads),
        **dict.fromkeys(OF_GRADIENT, _only("grad_output")),
        **dict.fromkeys(OF_GRADIENT_AND_INDICES, _only("grad_output", "indices")),
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

WRITES: Final[Mapping[OpOverloadPacket, Callable[[Call], Size]]] = MappingProxyType(
    {
        aten._fft_c2c: _fft_writes,
        aten._fft_r2c: _fft_writes,
        aten._fft_c2r: _fft_writes,
        **dict.fromkeys(PLACES, _scatter_writes),
    }
)

ALLOCATIONS: Final = frozenset(
    {
        aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,
        aten.detach, aten.alias, aten._unsafe_view, aten._reshape_alias, aten.lift_fresh,
        aten.unsafe_split, aten.unsafe_split_with_sizes, aten.set_,
    }
)  # fmt: skip


def moves_bytes(func: OpOverload, out: object) -> bool:
    """Whether a call does work on the device at all: it is no view, allocation or size query."""
    view = func.is_view or torch.Tag.inplace_view in func.tags
    free = view or func.overloadpacket in ALLOCATIONS
    return not free and any(True for _ in tensors_in(out))


def read_bytes(call: Call) -> Size:
    """Bytes that a call reads."""
    return READS.get(call.func.overloadpacket, _arguments_bytes)(call)


def written_bytes(call: Call) -> Size:
    """Bytes that a call writes."""
    writes = WRITES.get(call.func.overloadpacket)
    return writes(call) if writes else _bytes(call.out)


def traffic_class(func: OpOverload) -> Traffic:
    """The class of an operation, by its table row."""
    return CLASSES.get(func.overloadpacket, Traffic.POINTWISE)
