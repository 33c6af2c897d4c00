"""Whether an operation may run on shards: nothing may go over a dimension that ranks divide.

A rank of a sharded run holds 1/t of some dimensions: those with t in their size. What it computes
there is the whole model's result only if no operation mixes what lies along such a dimension. Equal
costs at t = 1 cannot show that: a softmax over the width of an MLP costs a rank 1/t, and is wrong.
So every forward operation of a layer is looked up here; one that is not known is refused.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Final

import torch
from sympy import Expr
from torch._ops import OpOverload, OpOverloadPacket

from mist.model.graph import B, S, T
from mist.trace.dispatch_call import Call, tensors_in
from mist.trace.operations.kernels import RMS_NORM

aten = torch.ops.aten

Shape = tuple[Expr, ...]
ShapeOf = Callable[[torch.Tensor], Shape]

# Each element of the result is one of the input, or comes from those at its own place.
ELEMENTWISE: Final = frozenset(
    {
        aten._to_copy, aten.copy_, aten.native_dropout, aten.bernoulli, aten.bernoulli_,
        aten.rand_like, aten._unsafe_view, aten._reshape_alias, aten.glu, aten.detach, aten.alias,
        aten.prelu, aten._prelu_kernel, aten.constant_pad_nd, aten.repeat,
    }
)  # fmt: skip
# Only the shape of the input counts.
ALLOCATIONS: Final = frozenset(
    {
        aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like, aten.new_empty,
        aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty_strided, aten.empty_strided,
        aten.fill_, aten.zero_,
    }
)  # fmt: skip
# Operand -> its dimension that the product sums over, from the end.
PRODUCTS: Final[Mapping[OpOverloadPacket, tuple[tuple[str, int], tuple[str, int]]]] = (
    MappingProxyType(
        {
            aten.mm: (("self", -1), ("mat2", -2)),
            aten.bmm: (("self", -1), ("mat2", -2)),
            aten.addmm: (("mat1", -1), ("mat2", -2)),
            aten._addmm_activation: (("mat1", -1), ("mat2", -2)),
            aten.baddbmm: (("batch1", -1), ("batch2", -2)),
            aten._grouped_mm: (("self", -1), ("mat2", -2)),
        }
    )
)
# Rows of tokens are put into another order, or counted: none is added to another one's.
ROUTING: Final = frozenset(
    {
        aten.index, aten.index_put, aten.index_put_, aten.index_select, aten.index_add,
        aten.index_add_, aten.gather, aten.scatter, aten.scatter_, aten.scatter_add,
        aten.scatter_add_, aten.sort, aten.topk, aten.histc, aten.bincount, aten._grouped_mm,
        aten.embedding,
    }
)  # fmt: skip
# Attention -> the dimension of its heads.
ATTENTION: Final[Mapping[OpOverloadPacket, int]] = MappingProxyType(
    {
        aten._scaled_dot_product_flash_attention: 1,
        aten._scaled_dot_product_efficient_attention: 1,
        aten._scaled_dot_product_cudnn_attention: 1,
        aten._scaled_dot_product_flash_attention_for_cpu: 1,
        aten._flash_attention_forward: 2,
    }
)
JOINED: Final = "puts parts of several matrices side by side, which a rank orders otherwise"
# Over the last dimensions: those of `normalized_shape`, or as many as `num_dims`.
NORMS: Final = frozenset({aten.native_layer_norm, RMS_NORM})


def norm_sum(call: Call, shape_of: ShapeOf) -> torch.Tensor | None:
    """The means over a divided last dimension, which ranks add up; None of other calls."""
    if call.func.overloadpacket not in (aten.mean, RMS_NORM):
        return None
    shape = shape_of(next(tensors_in([*call.arguments.values()])))
    last = [len(shape) - 1]
    alone = _divided(shape) == last and [*(_mixed_dims(call, shape) or ())] == last
    return [*tensors_in(call.out)][-1] if alone else None


def mixing(call: Call, shape_of: ShapeOf) -> Iterator[str]:
    """Why a forward call on shards is not the whole model's: what it does over a divided dimension.

    `shape_of` gives a tensor's shape in B, S, T; a dimension with T is divided.
    """
    packet = call.func.overloadpacket
    inputs = [shape_of(t) for t in tensors_in([*call.arguments.values()])]
    if not any(map(_divided, inputs)) or packet in ALLOCATIONS:
        return
    if packet in PRODUCTS:
        yield from _summed(call, shape_of)
    elif packet in ATTENTION:
        yield from _attended(call, shape_of)
    elif packet in (aten.cat, aten.stack) or _keeps(call.func):
        yield from _cut(call, inputs, shape_of)
    else:
        mixed = _mixed_dims(call, inputs[0])
        if mixed is None or set(mixed) & set(_divided(inputs[0])):
            yield "goes over a divided dimension"


def goes_over_tokens(call: Call, shape_of: ShapeOf) -> bool:
    """Whether a forward call on whole tensors computes with numbers of several tokens.

    Routing, which looks up rows of tokens, treats each alike. As `mixing` for a rank that would
    have 1/t of the tokens.
    """

    def of_tokens(tensor: torch.Tensor) -> Shape:
        return tuple(_among_tokens(size) for size in shape_of(tensor))

    inputs = list(tensors_in([*call.arguments.values()]))
    if call.func.overloadpacket in ROUTING or not all(t.is_floating_point() for t in inputs[:1]):
        return False
    whole = not any(_divided(shape_of(tensor)) for tensor in (*inputs, *tensors_in(call.out)))
    return whole and any(mixing(call, of_tokens))


def joins_shards(call: Call, shape_of: ShapeOf) -> bool:
    """Whether a call puts shards side by side along their divided dimension.

    A rank then has a part of each, which is no run of what the whole model has there.
    """
    if call.func.overloadpacket is not aten.cat:
        return False
    dim = call.arguments.get("dim", 0)
    assert isinstance(dim, int)
    return (
        sum(
            T in shape_of(tensor)[dim].free_symbols
            for tensor in tensors_in(call.arguments["tensors"])
        )
        > 1
    )


@cache
def _among_tokens(size: Expr) -> Expr:
    """A size where each rank has 1/t of the tokens."""
    return size.subs(S, S / T)


def is_partial(call: Call, shape_of: ShapeOf) -> bool:
    """Whether a forward call is a product whose result is this rank's part of a sum."""
    return any(T in shape[dim].free_symbols for shape, dim in _operands(call, shape_of))


def _operands(call: Call, shape_of: ShapeOf) -> list[tuple[Shape, int]]:
    """The operands of a product, and the dimension of each that it sums over."""
    sums = PRODUCTS.get(call.func.overloadpacket, ())
    return [(shape_of(call.tensor(name)), dim) for name, dim in sums]


def _divided(shape: Shape) -> list[int]:
    """The dimensions of which a rank holds a part."""
    return [dim for dim, size in enumerate(shape) if T in size.free_symbols]


def _keeps(func: OpOverload) -> bool:
    return torch.Tag.pointwise in func.tags or func.is_view or func.overloadpacket in ELEMENTWISE


def _summed(call: Call, shape_of: ShapeOf) -> Iterator[str]:
    """A sum over a divided dimension is a partial one: right only before a region's reduction."""
    weights = any(not _has_tokens(shape) for shape, _ in _operands(call, shape_of))
    if is_partial(call, shape_of) and not weights:
        yield "a product of activations sums over a divided dimension"


def _attended(call: Call, shape_of: ShapeOf) -> Iterator[str]:
    shapes = [shape_of(call.tensor(name)) for name in ("query", "key", "value")]
    heads_dim = ATTENTION[call.func.overloadpacket]
    if any(set(_divided(shape)) - {heads_dim} for shape in shapes):
        yield "attention goes over a divided dimension that is not its heads"


def _has_tokens(shape: Shape) -> bool:
    return any(size.free_symbols & {B, S} for size in shape)


def _cut(call: Call, inputs: Sequence[Shape], shape_of: ShapeOf) -> Iterator[str]:
    """A part of the shards, or shards joined with whole tensors, is no shard of the whole."""
    outputs = [shape_of(t) for t in tensors_in([call.out])]
    sizes = [size for shape in (*inputs, *outputs) for size in shape if T in size.free_symbols]
    # A shard has c / t elements along a dimension; a sum of a shard and a whole has a constant,
    # too.
    if any((size * T).expand().has(T) for size in sizes):
        yield "puts shards and whole tensors beside each other"
    if not all(map(_divided, outputs)):
        yield "takes a fixed part of a divided dimension"


def _mixed_dims(call: Call, shape: Shape) -> Iterable[int] | None:
    """The dimensions that an operation works along; None where that is not known."""
    arguments, ndim = call.arguments, len(shape)
    if call.func.overloadpacket in NORMS:
        norm_dims = arguments.get("normalized_shape", arguments.get("num_dims"))
        count = len(norm_dims) if isinstance(norm_dims, list | tuple) else int(str(norm_dims))
        return range(ndim - count, ndim)
    if call.func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
        indices = arguments["indices"]
        assert isinstance(indices, list | tuple)
        return [dim for dim, index in enumerate(indices) if index is not None]
    dims = arguments.get("dim", arguments.get("dims"))
    if isinstance(dims, int):
        return [dims % ndim]
    if isinstance(dims, list | tuple) and dims:
        return [int(dim) % ndim for dim in dims]
    return None
