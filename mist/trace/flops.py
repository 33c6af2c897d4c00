"""Which operations multiply matrices: their kind, GEMM or attention dims, and FLOPs.

One row per aten operation. A multiply-add counts 2; attention counts without causal skipping, its
backward with the recomputed scores (torch.utils.flop_counter's conventions, against which the
tests compare every row). Torch has no formula for attention on the CPU and would count it as 0.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Final

import torch
from torch._ops import OpOverload, OpOverloadPacket

from mist.errors import TraceError
from mist.graph import OpKind
from mist.trace.expr import Size

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Call:
    """One dispatched call with its arguments by name."""

    func: OpOverload
    arguments: Mapping[str, object]
    out: object

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor argument."""
        value = self.arguments[name]
        assert isinstance(value, torch.Tensor), (self.func, name)
        return value

    @property
    def first_out(self) -> torch.Tensor:
        """The result, or the first of several."""
        value = self.out[0] if isinstance(self.out, tuple | list) else self.out
        assert isinstance(value, torch.Tensor), self.func
        return value


@dataclass(frozen=True, slots=True)
class Work:
    """What one call computes: dims as in `mist.graph.Op`, and FLOPs."""

    kind: OpKind
    dims: tuple[Size, ...]
    flop: Size


def _gemm(batch: Size, m: Size, n: Size, k: Size) -> Work:
    return Work(OpKind.GEMM, (batch, m, n, k), 2 * batch * m * n * k)


def _mm(left: str, right: str) -> Callable[[Call], list[Work]]:
    def work(call: Call) -> list[Work]:
        (m, k), n = call.tensor(left).shape, call.tensor(right).shape[1]
        return [_gemm(1, m, n, k)]

    return work


def _bmm(left: str, right: str) -> Callable[[Call], list[Work]]:
    def work(call: Call) -> list[Work]:
        (batch, m, k), n = call.tensor(left).shape, call.tensor(right).shape[2]
        return [_gemm(batch, m, n, k)]

    return work


def _implicit_gemm(points: Sequence[Size], weight: torch.Tensor, groups: int) -> Work:
    """Convolution: every point (batch x space) of the larger side times the kernel."""
    out, k = weight.shape[0] // groups, prod(weight.shape[1:])
    return _gemm(groups, prod(points), out, k)


def _convolution(call: Call) -> list[Work]:
    x, weight, groups = call.tensor("input"), call.tensor("weight"), call.arguments["groups"]
    assert isinstance(groups, int)
    side = x if call.arguments["transposed"] else call.first_out
    return [_implicit_gemm((x.shape[0], *side.shape[2:]), weight, groups)]


def _convolution_backward(call: Call) -> list[Work]:
    x, weight, groups = call.tensor("input"), call.tensor("weight"), call.arguments["groups"]
    grad, mask = call.tensor("grad_output"), call.arguments["output_mask"]
    assert isinstance(groups, int) and isinstance(mask, list)
    side = x if call.arguments["transposed"] else grad
    work = _implicit_gemm((x.shape[0], *side.shape[2:]), weight, groups)
    return [work] * sum(mask[:2])


def _attention(qk_products: int, v_products: int) -> Callable[[Call], list[Work]]:
    """`qk_products` matrix products over the head size of queries, the others over the values'."""

    def work(call: Call) -> list[Work]:
        batch, heads, seq_q, head_dim = call.tensor("query").shape
        seq_k, value_dim = call.tensor("key").shape[2], call.tensor("value").shape[3]
        widths = qk_products * head_dim + v_products * value_dim
        dims = (batch, heads, seq_q, seq_k, head_dim)
        return [Work(OpKind.ATTENTION, dims, 2 * batch * heads * seq_q * seq_k * widths)]

    return work


ATTENTION_FORWARD: Final = _attention(1, 1)
ATTENTION_BACKWARD: Final = _attention(3, 2)

RULES: Final[Mapping[OpOverloadPacket, Callable[[Call], list[Work]]]] = MappingProxyType(
    {
        aten.mm: _mm("self", "mat2"),
        aten.addmm: _mm("mat1", "mat2"),
        aten.bmm: _bmm("self", "mat2"),
        aten.baddbmm: _bmm("batch1", "batch2"),
        aten.convolution: _convolution,
        aten.convolution_backward: _convolution_backward,
        aten._scaled_dot_product_flash_attention: ATTENTION_FORWARD,
        aten._scaled_dot_product_efficient_attention: ATTENTION_FORWARD,
        aten._scaled_dot_product_cudnn_attention: ATTENTION_FORWARD,
        aten._scaled_dot_product_flash_attention_for_cpu: ATTENTION_FORWARD,
        aten._scaled_dot_product_flash_attention_backward: ATTENTION_BACKWARD,
        aten._scaled_dot_product_efficient_attention_backward: ATTENTION_BACKWARD,
        aten._scaled_dot_product_cudnn_attention_backward: ATTENTION_BACKWARD,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: ATTENTION_BACKWARD,
    }
)

# Name parts of operations that do far more than move their bytes, and have no rule above.
HEAVY: Final = (
    "attention",
    "cdist",
    "cholesky",
    "conv",
    "eig",
    "fft",
    "flex",
    "gru",
    "inverse",
    "linalg",
    "lstm",
    "matmul",
    "mkldnn",
    "_mm",
    "rnn",
    "scaled_mm",
    "svd",
)


def work_of(call: Call) -> list[Work]:
    """The matrix products of one call; none when it only moves bytes.

    Raises TraceError for an operation that computes much and has no rule.
    """
    rule = RULES.get(call.func.overloadpacket)
    if rule is not None:
        return rule(call)
    name = call.func.overloadpacket.__name__
    if any(part in name for part in HEAVY):
        raise TraceError(
            f"operation {call.func.overloadpacket} does heavy arithmetic that Mist has no FLOP "
            "formula for, so its time would be counted as zero. Use a layer built from linear, "
            "matmul, convolution or scaled_dot_product_attention in its place."
        )
    return []


def bind(
    func: OpOverload, args: Sequence[object], kwargs: Mapping[str, object]
) -> dict[str, object]:
    """The arguments of a call by name, with the schema's defaults."""
    schema = func._schema.arguments
    bound = {a.name: a.default_value for a in schema if a.has_default_value()}
    return bound | {a.name: value for a, value in zip(schema, args, strict=False)} | dict(kwargs)
