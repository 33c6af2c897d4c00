"""Which operations multiply matrices: their kind, GEMM or attention dims, and FLOPs.

One row per aten operation. A multiply-add counts 2; attention counts without causal skipping, its
backward with the recomputed scores (torch.utils.flop_counter's conventions, against which the
tests compare every row that it has right). It counts attention on the CPU as 0, a complex product
as a real one, and no Fourier transform; here a complex multiply-add is 8 FLOPs (four real products)
and a transform of N complex points 5 N log2 N, half of that when one side is real (Cooley and Tukey
1965; the convention of FFTW's benchmarks).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from types import MappingProxyType
from typing import Final

import torch
from torch._ops import OpOverloadPacket

from mist.errors import TraceError
from mist.model.graph import OpKind
from mist.trace.dispatch_call import Call
from mist.trace.expressions import Size
from mist.trace.operations.scan_kernels import SCAN_OPS, scan_work
from mist.trace.operations.windows import Window
from mist.trace.operations.work import Work, gemm

aten = torch.ops.aten


def _products(of: torch.Tensor) -> int:
    """Real products that one product is: four of complex numbers."""
    return 4 if of.is_complex() else 1


def _mm(left: str, right: str) -> Callable[[Call], list[Work]]:
    def work(call: Call) -> list[Work]:
        x = call.tensor(left)
        (m, k), n = x.shape, call.tensor(right).shape[1]
        return [gemm(_products(x), m, n, k)]

    return work


def _bmm(left: str, right: str) -> Callable[[Call], list[Work]]:
    def work(call: Call) -> list[Work]:
        x = call.tensor(left)
        (batch, m, k), n = x.shape, call.tensor(right).shape[2]
        return [gemm(_products(x) * batch, m, n, k)]

    return work


def _mv(matrix: str) -> Callable[[Call], list[Work]]:
    def work(call: Call) -> list[Work]:
        x = call.tensor(matrix)
        return [gemm(_products(x), x.shape[0], 1, x.shape[1])]

    return work


def _dot(call: Call) -> list[Work]:
    x = call.tensor("self")
    return [gemm(_products(x), 1, 1, x.numel())]


def _euclidean_dist(call: Call) -> list[Work]:
    """Squared distances as one product of rows of k + 2: [-2 x, |x|^2, 1] and [y, 1, |y|^2]."""
    x, y = call.tensor("x1"), call.tensor("x2")
    return [gemm(prod(x.shape[:-2]), x.shape[-2], y.shape[-2], x.shape[-1] + 2)]


def _solve_triangular(call: Call) -> list[Work]:
    """X of A X = B, or of X A = B, with A [*, n, n]: n (n - 1) / 2 multiply-adds and n divisions.

    That is n^2 FLOPs for each of the k columns (or rows) of B: half of the product of A and B.
    """
    a, b = call.tensor("self"), call.tensor("B")
    batch, n, numel = prod(b.shape[:-2]), a.shape[-1], b.numel()
    dims = (batch, n, b.shape[-1] if call.arguments.get("left", True) else b.shape[-2], n // 2)
    return [Work(OpKind.GEMM, dims, numel * n)]


def _grouped_mm(call: Call) -> list[Work]:
    """Rows of experts by their matrices, or, of two plain matrices, one gradient per expert."""
    left, right = call.tensor("self"), call.tensor("mat2")
    if call.arguments["offs"] is None:
        return _bmm("self", "mat2")(call)
    groups = int(call.tensor("offs").shape[0])
    work = gemm(1, left.shape[-2], right.shape[-1], left.shape[-1])
    # Which size the offsets divide follows from the dimensions of the operands: rows, columns, or
    # the summed one.
    split = {(2, 3): 1, (3, 2): 2, (2, 2): 3}[left.dim(), right.dim()]
    return [replace(work, groups=groups, split=split)]


def _transform(x: torch.Tensor, dims: object) -> Work:
    """All 1-D transforms along `dims` of x: N log2 N for each, so numel log2 of all lengths."""
    assert isinstance(dims, list | tuple)
    flop = 5 * x.numel() if x.is_complex() else 5 * x.numel() // 2
    return Work(OpKind.MEMORY, (), flop, log2_of=prod(x.shape[dim] for dim in dims))


def _fft(call: Call) -> list[Work]:
    """Counted on the real side, where there is one."""
    x, out = call.tensor("self"), call.first_out
    return [_transform(x if out.is_complex() else out, call.arguments["dim"])]


def _implicitgemm(points: Sequence[Size], weight: torch.Tensor, groups: int) -> Work:
    """Convolution: every point (batch x space) of the larger side times the kernel."""
    out, k = weight.shape[0] // groups, prod(weight.shape[1:])
    return gemm(groups, prod(points), out, k)


def _convolution(call: Call) -> list[Work]:
    x, weight, groups = call.tensor("input"), call.tensor("weight"), call.arguments["groups"]
    assert isinstance(groups, int)
    side = x if call.arguments["transposed"] else call.first_out
    return [_implicitgemm((x.shape[0], *side.shape[2:]), weight, groups)]


def _convolution_backward(call: Call) -> list[Work]:
    x, weight, groups = call.tensor("input"), call.tensor("weight"), call.arguments["groups"]
    grad, mask = call.tensor("grad_output"), call.arguments["output_mask"]
    assert isinstance(groups, int) and isinstance(mask, list)
    side = x if call.arguments["transposed"] else grad
    work = _implicitgemm((x.shape[0], *side.shape[2:]), weight, groups)
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


def _window_attention(qk_products: int, v_products: int) -> Callable[[Call], list[Work]]:
    """Over the pairs in a window, as so many keys for each query: tensors are [b, s, h, d]."""

    def work(call: Call) -> list[Work]:
        batch, seq_q, heads, head_dim = call.tensor("query").shape
        left, right = call.arguments["window_size_left"], call.arguments["window_size_right"]
        assert isinstance(left, int) and isinstance(right, int)
        pairs = Window(left, right).pairs(seq_q)
        widths = qk_products * head_dim + v_products * call.tensor("value").shape[3]
        dims = (batch, heads, seq_q, pairs // seq_q, head_dim)
        return [Work(OpKind.ATTENTION, dims, 2 * batch * heads * pairs * widths)]

    return work


ATTENTION_FORWARD: Final = _attention(1, 1)
ATTENTION_BACKWARD: Final = _attention(3, 2)

RULES: Final[Mapping[OpOverloadPacket, Callable[[Call], list[Work]]]] = MappingProxyType(
    {
        aten.mm: _mm("self", "mat2"),
        aten.addmm: _mm("mat1", "mat2"),
        aten.bmm: _bmm("self", "mat2"),
        aten.addmm_: _mm("mat1", "mat2"),
        aten._addmm_activation: _mm("mat1", "mat2"),
        aten._scaled_mm: _mm("self", "mat2"),
        aten.baddbmm: _bmm("batch1", "batch2"),
        aten.baddbmm_: _bmm("batch1", "batch2"),
        aten.addbmm: _bmm("batch1", "batch2"),
        aten.mv: _mv("self"),
        aten.addmv: _mv("mat"),
        aten.dot: _dot,
        aten.vdot: _dot,
        aten._euclidean_dist: _euclidean_dist,
        aten._grouped_mm: _grouped_mm,
        aten.linalg_solve_triangular: _solve_triangular,
        aten._fft_c2c: _fft,
        aten._fft_r2c: _fft,
        aten._fft_c2r: _fft,
        **dict.fromkeys(SCAN_OPS, scan_work),
        aten.convolution: _convolution,
        aten.convolution_backward: _convolution_backward,
        aten._scaled_dot_product_flash_attention: ATTENTION_FORWARD,
        aten._scaled_dot_product_efficient_attention: ATTENTION_FORWARD,
        aten._scaled_dot_product_cudnn_attention: ATTENTION_FORWARD,
        aten._scaled_dot_product_flash_attention_for_cpu: ATTENTION_FORWARD,
        aten._flash_attention_forward: _window_attention(1, 1),
        aten._flash_attention_backward: _window_attention(3, 2),
        aten._scaled_dot_product_flash_attention_backward: ATTENTION_BACKWARD,
        aten._scaled_dot_product_efficient_attention_backward: ATTENTION_BACKWARD,
        aten._scaled_dot_product_cudnn_attention_backward: ATTENTION_BACKWARD,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: ATTENTION_BACKWARD,
    }
)

# Words in the names of operations that do far more than move their bytes.
HEAVY: Final = frozenset(
    {
        "attention", "cdist", "cholesky", "conv", "eig", "eigh", "eigvals", "fft",
        "flex", "gru", "inv", "inverse", "linalg", "linear", "lstm", "lu", "matmul", "mkldnn", "mm",
        "addmm", "pdist", "qr", "rnn", "solve", "svd", "trilinear",
    }
)  # fmt: skip
# Names with such a word, or one that begins like a convolution, that are cheap all the same.
CHEAP: Final = re.compile(r"upsample|convert|linalg_(vector_norm|cross|diagonal)|fft_r?fftfreq")


RECURRENT: Final = frozenset({"rnn", "lstm", "gru"})


def _is_heavy(name: str) -> bool:
    words = name.split("_")
    heavy = any(word in HEAVY or word.startswith("conv") for word in words)
    return heavy and not CHEAP.search(name)


def work_of(call: Call) -> list[Work]:
    """The matrix products of one call; none when it only moves bytes.

    Raises TraceError for an operation that computes much and has no rule.
    """
    rule = RULES.get(call.func.overloadpacket)
    if rule is not None:
        return rule(call)
    name = call.func.overloadpacket.__name__
    if RECURRENT & set(name.split("_")):
        raise TraceError(
            f"operation {call.func.overloadpacket} (nn.LSTM, nn.GRU or nn.RNN) goes through the "
            "tokens one by one, as on a CPU or with packed sequences, which Mist has no costs for. "
            "Plan for a GPU, and give the network plain tensors."
        )
    if _is_heavy(name):
        raise TraceError(
            f"operation {call.func.overloadpacket} does heavy arithmetic that Mist has no FLOP "
            "formula for, so its time would be counted as zero. Use a layer built from linear, "
            "matmul, convolution or scaled_dot_product_attention in its place."
        )
    return []
