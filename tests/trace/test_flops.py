"""The tables of operations: FLOPs against torch's own formulas, traffic by hand."""

from collections.abc import Callable
from math import log2

import pytest
import torch
from torch import Tensor, empty
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mist.errors import TraceError
from mist.model.graph import OpKind
from mist.model.summary import Traffic
from mist.trace.dispatch_call import Call, bind
from mist.trace.operations.flops import RULES, _is_heavy, work_of
from mist.trace.operations.scan_kernels import SCAN_OPS
from mist.trace.operations.traffic import moves_bytes, read_bytes, traffic_class, written_bytes
from mist.trace.operations.work import Work

aten = torch.ops.aten
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
}
WINDOWED = {aten._flash_attention_forward, aten._flash_attention_backward}


class Calls(TorchDispatchMode):
    """Every dispatched call, and torch's FLOPs of it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.torch_flop: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        self.calls.append(Call(func, bind(func, args, kwargs or {}), out))
        formula = flop_registry.get(func.overloadpacket)
        self.torch_flop.append(formula(*args, **(kwargs or {}), out_val=out) if formula else 0)
        return out


def record(function: Callable[[], Tensor]) -> Calls:
    with FakeTensorMode(), Calls() as calls:
        out = function()
        if out.requires_grad:
            total = out.sum()
            (total.real if total.is_complex() else total).backward()
    return calls


def need(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return empty(*shape, dtype=dtype, requires_grad=True)


def qkv(dtype: torch.dtype = torch.float32, kv_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    q = need(2, 4, 96, 32, dtype=dtype)
    return q, need(2, kv_heads, 64, 32, dtype=dtype), need(2, kv_heads, 64, 32, dtype=dtype)


def flash() -> Tensor:
    return aten._scaled_dot_product_flash_attention(*qkv(torch.bfloat16))[0]


def flash_of_groups() -> Tensor:
    """Two query heads to each head of keys, and dropout."""
    return aten._scaled_dot_product_flash_attention(*qkv(torch.bfloat16, kv_heads=2), 0.1)[0]


def wide_values() -> tuple[Tensor, Tensor, Tensor]:
    query, key, _ = qkv(torch.bfloat16)
    return query, key, need(2, 4, 64, 64, dtype=torch.bfloat16)


def efficient() -> Tensor:
    return aten._scaled_dot_product_efficient_attention(*qkv(), None, True)[0]


def cudnn() -> Tensor:
    return aten._scaled_dot_product_cudnn_attention(*qkv(torch.bfloat16), None, True)[0]


FUNCTIONS: dict[str, Callable[[], Tensor]] = {
    "mm": lambda: need(3, 5) @ need(5, 7),
    "addmm": lambda: torch.addmm(need(7), need(3, 5), need(5, 7)),
    "bmm": lambda: need(2, 3, 5) @ need(2, 5, 7),
    "baddbmm": lambda: torch.baddbmm(need(2, 3, 7), need(2, 3, 5), need(2, 5, 7)),
    "conv1d": lambda: torch.conv1d(need(2, 6, 50), need(8, 6, 3), stride=2),
    "conv2d": lambda: torch.conv2d(need(2, 6, 20, 30), need(8, 6, 5, 5), padding=1),
    "conv transposed": lambda: torch.conv_transpose1d(need(2, 6, 50), need(6, 4, 3), stride=2),
    "conv3d": lambda: torch.conv3d(need(2, 6, 8, 8, 8), need(8, 6, 3, 3, 3)),
    "conv transposed 3d": lambda: torch.conv_transpose3d(
        need(2, 6, 8, 8, 8), need(6, 4, 2, 2, 2), stride=2
    ),
    "flash": flash,
    "flash of groups": flash_of_groups,
    "efficient": efficient,
    "efficient, wide values": lambda: aten._scaled_dot_product_efficient_attention(
        *wide_values(), None, True, 0.1
    )[0],
    "cudnn": cudnn,
    "cudnn, wide values": lambda: aten._scaled_dot_product_cudnn_attention(
        *wide_values(), None, True
    )[0],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_flops_are_torchs(name: str) -> None:
    calls = record(FUNCTIONS[name])
    ours = [sum(work.flop for work in work_of(call)) for call in calls.calls]
    assert ours == calls.torch_flop
    assert sum(flop > 0 for flop in ours) >= 2, "forward and backward"


C64 = torch.complex64


def plain(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return empty(*shape, dtype=dtype)


def grouped() -> Tensor:
    """12 rows of 16 for 4 experts of 16 x 8."""
    ends = empty(4, dtype=torch.int32)
    out = torch._grouped_mm(need(12, 16, dtype=BF16), need(4, 16, 8, dtype=BF16), offs=ends)
    return out * 2  # so that its gradient is a tensor, not an expanded number


def half_grouped() -> Tensor:
    """Columns of the right matrix for 4 experts."""
    ends = empty(4, dtype=torch.int32)
    left, right = plain(4, 8, 16, dtype=BF16), plain(16, 24, dtype=BF16)
    return torch._grouped_mm(left, right, offs=ends)


def scaled() -> Tensor:
    left, right = plain(16, 32, dtype=FP8), plain(16, 32, dtype=FP8).t()
    return torch._scaled_mm(left, right, plain(()), plain(()), out_dtype=BF16)


BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
# What torch counts wrongly, or not at all. A complex multiply-add is 4 real products and 4 real
# additions: 8 FLOPs, where torch counts 2. A Fourier transform of N complex points takes
# 5 N log2 N; of real ones, or to real ones, half.
BY_HAND: dict[str, tuple[Callable[[], Tensor], list[float]]] = {
    "complex mm": (lambda: need(3, 5, dtype=C64) @ need(5, 7, dtype=C64), [8 * 3 * 5 * 7] * 3),
    "complex bmm": (
        lambda: torch.einsum(
            "bixy,ioxy->boxy", need(2, 3, 8, 5, dtype=C64), need(3, 6, 8, 5, dtype=C64)
        ),
        [8 * 2 * 3 * 6 * 40] * 3,
    ),
    "fft2": (lambda: torch.fft.fft2(need(2, 16, 32, dtype=C64)), [5 * 1024 * 9] * 2),
    "rfft": (lambda: torch.fft.rfft(need(3, 64)), [2.5 * 192 * 6, 5 * 192 * 6]),
    "irfft": (lambda: torch.fft.irfft(need(3, 33, dtype=C64)), [2.5 * 192 * 6] * 2),
    "grouped": (grouped, [2 * 12 * 16 * 8] * 3),
    "half grouped": (half_grouped, [2 * 8 * 16 * 24]),
    "scaled": (scaled, [2 * 16 * 32 * 16]),
    # Of more than 25 rows torch takes the product; its backward is two more, of 4 columns.
    "cdist": (
        lambda: torch.cdist(need(30, 4), need(50, 4)),
        [2 * 30 * 50 * (4 + 2), 2 * 30 * 50 * 4, 2 * 30 * 50 * 4],
    ),
    "depthwise": (
        lambda: torch.conv2d(need(2, 6, 8, 8), need(12, 1, 3, 3), groups=6),
        [2 * (2 * 6 * 6) * 12 * 9, 2 * 2 * (2 * 6 * 6) * 12 * 9],
    ),
    # Half of a product of a 5 x 5 matrix and 3 columns, twice; its backward has the whole one, too.
    "triangular solve": (
        lambda: torch.linalg.solve_triangular(need(2, 5, 5), need(2, 5, 3), upper=False),
        [2 * 25 * 3, 2 * 25 * 3, 2 * 2 * 25 * 3],
    ),
    "mv": (lambda: need(3, 5) @ need(5), [2 * 15] * 2),
    "addmv": (lambda: torch.addmv(plain(3), plain(3, 5), plain(5)), [2 * 15]),
    "dot": (lambda: plain(5) @ plain(5), [2 * 5]),
    "vdot": (lambda: torch.vdot(plain(5, dtype=C64), plain(5, dtype=C64)), [8 * 5]),
    "addbmm": (lambda: torch.addbmm(plain(3, 7), plain(2, 3, 5), plain(2, 5, 7)), [2 * 210]),
    "addmm_": (lambda: plain(3, 7).addmm_(plain(3, 5), plain(5, 7)), [2 * 105]),
    "baddbmm_": (lambda: plain(2, 3, 7).baddbmm_(plain(2, 3, 5), plain(2, 5, 7)), [2 * 210]),
    "activation": (
        lambda: torch._addmm_activation(plain(7), plain(3, 5), plain(5, 7)),
        [2 * 105],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_flops_by_hand(name: str) -> None:
    function, expected = BY_HAND[name]
    calls = record(function)
    works = [work_of(call) for call in calls.calls]
    flops = [sum(work.flop * log2(work.log2_of) for work in each) for each in works]
    assert [flop for flop in flops if flop] == pytest.approx(expected, rel=1e-12)


def test_dims_of_experts() -> None:
    """Each expert has 3 rows of the 12 on average; its gradient sums over its rows."""
    works = products(grouped)
    assert [(work.dims, work.groups, work.split) for work in works] == [
        ((1, 12, 8, 16), 4, 1),
        ((1, 16, 8, 12), 4, 3),
        ((1, 12, 16, 8), 4, 1),
    ]


def test_every_rule_is_compared() -> None:
    functions = [*FUNCTIONS.values(), *(function for function, _ in BY_HAND.values())]
    seen = {call.func.overloadpacket for make in functions for call in record(make).calls}
    assert set(RULES) - seen == CPU_ATTENTION | WINDOWED | set(
        SCAN_OPS
    )  # test_exact, test_regimes, test_scans


@pytest.mark.parametrize("name", ["convert_element_type", "upsample_bilinear2d", "_weight_norm"])
def test_names_that_only_look_heavy(name: str) -> None:
    assert not _is_heavy(name)


@pytest.mark.parametrize(
    "name", ["_int_mm", "cudnn_convolution", "_cdist_forward", "_pdist_forward", "lstm"]
)
def test_names_that_are_heavy(name: str) -> None:
    assert _is_heavy(name)


def products(function: Callable[[], Tensor]) -> list[Work]:
    return [work for call in record(function).calls for work in work_of(call)]


def test_dims_of_a_product() -> None:
    forward, to_left, to_right = products(FUNCTIONS["bmm"])
    assert forward == Work(OpKind.GEMM, (2, 3, 7, 5), 2 * 2 * 3 * 7 * 5)
    assert sorted([to_left.dims, to_right.dims]) == [(2, 3, 5, 7), (2, 5, 7, 3)]


def test_convolution_is_an_implicit_product() -> None:
    """Two groups: 2 x 18 x 28 outputs of 4 channels from 3 channels of 5 x 5.

    Not compared with torch, whose formula for the weight's gradient forgets the groups.
    """
    works = products(
        lambda: torch.conv2d(need(2, 6, 20, 30), need(8, 3, 5, 5), groups=2, padding=1)
    )
    assert [work.dims for work in works] == [(2, 2 * 18 * 28, 4, 3 * 5 * 5)] * 3


def test_heavy_operation_without_a_rule() -> None:
    calls = record(lambda: torch.linalg.inv(need(4, 4)))
    with pytest.raises(TraceError) as error:
        [work_of(call) for call in calls.calls]
    assert str(error.value) == (
        "operation aten.linalg_inv_ex does heavy arithmetic that Mist has no FLOP formula for, so "
        "its time would be counted as zero. Use a layer built from linear, matmul, convolution or "
        "scaled_dot_product_attention in its place."
    )


def test_a_recurrence_is_refused_by_its_name() -> None:
    calls = record(lambda: torch.nn.LSTM(4, 4)(need(3, 2, 4))[0])
    words = r"operation aten\.\w+ \(nn.LSTM, nn.GRU or nn.RNN\) goes through the tokens one by one"
    with pytest.raises(TraceError, match=words):
        [work_of(call) for call in calls.calls]


def last(function: Callable[[], Tensor]) -> Call:
    with FakeTensorMode(), torch.no_grad(), Calls() as calls:
        function()
    return calls.calls[-1]


def ids(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int64)


def twice(x: Tensor) -> Tensor:
    return x * x


# fp32 unless said; each tensor once: what is read plus what is written.
TRAFFIC: dict[str, tuple[Callable[[], Tensor], int, Traffic]] = {
    "pointwise": (lambda: empty(8, 4) + empty(8, 4), 3 * 128, Traffic.POINTWISE),
    "broadcast": (lambda: empty(8, 4) + empty(4), 2 * 128 + 16, Traffic.POINTWISE),
    "same tensor twice": (lambda: twice(empty(8, 4)), 2 * 128, Traffic.POINTWISE),
    "expanded": (lambda: empty(1, 4).expand(8, 4) * 2, 16 + 128, Traffic.POINTWISE),
    "in place": (lambda: empty(8, 4).add_(empty(8, 4)), 3 * 128, Traffic.POINTWISE),
    "cast": (lambda: empty(8, 4).to(torch.bfloat16), 128 + 64, Traffic.POINTWISE),
    "fill": (lambda: empty(8, 4).fill_(0), 128, Traffic.POINTWISE),
    "copy": (lambda: empty(8, 4).copy_(empty(8, 4)), 2 * 128, Traffic.POINTWISE),
    "sum": (lambda: empty(8, 4).sum(1), 128 + 32, Traffic.REDUCTION),
    "softmax": (lambda: empty(8, 4).softmax(-1), 2 * 128, Traffic.SOFTMAX),
    "embedding": (
        lambda: torch.embedding(empty(1000, 4), empty(8, dtype=torch.int64)),
        64 + 2 * 128,
        Traffic.GATHER,
    ),
    "index_add_": (
        lambda: empty(100, 4).index_add_(0, empty(8, dtype=torch.int64), empty(8, 4)),
        64 + 3 * 128,  # index; source, places read and written
        Traffic.GATHER,
    ),
    "index_add": (
        lambda: empty(100, 4).index_add(0, empty(8, dtype=torch.int64), empty(8, 4)),
        64 + 3 * 128 + 2 * 1600,  # and a copy of the whole
        Traffic.GATHER,
    ),
    "scatter_add_": (
        lambda: empty(100, 4).scatter_add_(0, empty(8, 4, dtype=torch.int64), empty(8, 4)),
        256 + 3 * 128,
        Traffic.GATHER,
    ),
    "index_put_": (
        lambda: empty(100, 4).index_put_((empty(8, dtype=torch.int64),), empty(8, 4)),
        64 + 3 * 128,
        Traffic.GATHER,
    ),
    "index_put_ of a number": (
        lambda: empty(100, 4).index_put_((ids(8),), empty(())),
        64 + 4 + 2 * 128,  # eight rows change, whatever the size of the value
        Traffic.GATHER,
    ),
    "index_put_ of rows, two indices": (
        lambda: empty(100, 5, 4).index_put_((ids(8, 1), ids(2)), empty(4)),
        64 + 16 + 16 + 2 * (8 * 2 * 4 * 4),
        Traffic.GATHER,
    ),
    "index_put_ behind a whole dimension": (
        lambda: aten.index_put_(empty(10, 100, 4), [None, ids(8)], empty(4)),
        64 + 16 + 2 * (10 * 8 * 4 * 4),
        Traffic.GATHER,
    ),
    "index_put_ by a mask": (
        lambda: empty(100, 4, 3).index_put_((empty(100, 4, dtype=torch.bool),), empty(3)),
        400 + 12 + 2 * 4800,  # at most all
        Traffic.GATHER,
    ),
    "index_fill_": (
        lambda: empty(100, 4).index_fill_(0, ids(8), 0.0),
        64 + 2 * 128,
        Traffic.GATHER,
    ),
    "index_reduce_": (
        lambda: empty(100, 4).index_reduce_(0, ids(8), empty(8, 4), "amax"),
        64 + 3 * 128,
        Traffic.GATHER,
    ),
    "put_": (
        lambda: empty(100, 4).put_(ids(8), empty(8)),
        64 + 3 * 32,
        Traffic.GATHER,
    ),
    "scatter_reduce_": (
        lambda: empty(100, 4).scatter_reduce_(0, ids(8, 4), empty(8, 4), "amax"),
        256 + 3 * 128,
        Traffic.GATHER,
    ),
    "scatter_add of an expanded number": (
        lambda: empty(1).expand(100, 4).scatter_add(0, ids(8, 4), empty(8, 4)),
        4 + 1600 + 256 + 3 * 128,  # read as one number, written whole
        Traffic.GATHER,
    ),
    # 18 rows of 16 bytes, 18 indices, 6 starts; 6 sums, and 18 + 6 + 6 numbers for backward.
    "embedding_bag": (
        lambda: aten._embedding_bag(empty(1000, 4), ids(18), ids(6), False, 1)[0],
        288 + 144 + 48 + 96 + 240,
        Traffic.GATHER,
    ),
    "embedding_bag, frozen": (
        lambda: torch.nn.functional.embedding_bag(ids(6, 3), empty(1000, 4)),
        288 + 144 + 48 + 96 + 240,
        Traffic.GATHER,
    ),
    "rfft2": (
        lambda: torch.fft.rfft2(empty(8, 14)),
        448 + 3 * 8 * 8 * 8,  # two passes: x to 8 x 8 complex numbers, those once more
        Traffic.POINTWISE,
    ),
    "batch norm": (
        lambda: torch.nn.functional.batch_norm(empty(8, 4), empty(4), empty(4), training=True),
        2 * 128 + 2 * 16 + 2 * 16,
        Traffic.NORM_FORWARD,
    ),
    "layer norm": (
        lambda: torch.nn.functional.layer_norm(empty(8, 4), (4,), empty(4), empty(4)),
        2 * 128 + 2 * 16 + 2 * 32,
        Traffic.NORM_FORWARD,
    ),
}


@pytest.mark.parametrize("name", TRAFFIC)
def test_traffic(name: str) -> None:
    function, num_bytes, kind = TRAFFIC[name]
    call = last(function)
    assert moves_bytes(call.func, call.out)
    assert read_bytes(call) + written_bytes(call) == num_bytes
    assert traffic_class(call.func) is kind


F = torch.nn.functional
SHAPE_ALONE: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool2d": lambda x: F.max_pool2d(x[0], 2),
    "max_pool3d": lambda x: F.max_pool3d(x, 2),
    "avg_pool2d": lambda x: F.avg_pool2d(x[0], 2),
    "avg_pool3d": lambda x: F.avg_pool3d(x, 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x[0], 2),
    "adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(x, 2),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x[0], 2),
    "adaptive_max_pool3d": lambda x: F.adaptive_max_pool3d(x, 2),
    "reflection_pad1d": lambda x: F.pad(x[0, 0], (1, 1), mode="reflect"),
    "reflection_pad2d": lambda x: F.pad(x[0], (1, 1, 1, 1), mode="reflect"),
    "reflection_pad3d": lambda x: F.pad(x, (1,) * 6, mode="reflect"),
    "replication_pad1d": lambda x: F.pad(x[0, 0], (1, 1), mode="replicate"),
    "replication_pad2d": lambda x: F.pad(x[0], (1, 1, 1, 1), mode="replicate"),
    "replication_pad3d": lambda x: F.pad(x, (1,) * 6, mode="replicate"),
}


@pytest.mark.parametrize("name", SHAPE_ALONE)
def test_backward_that_needs_the_shape_of_its_input_alone(name: str) -> None:
    """Real tensors: the gradient is the same when the input is lost, so it is not read."""
    x = torch.randn(1, 2, 8, 8, 8, requires_grad=True)
    with Calls() as calls:
        SHAPE_ALONE[name](x).sum().backward()
    (call,) = [c for c in calls.calls if name in str(c.func) and "backward" in str(c.func)]
    lost = {**call.arguments, "self": torch.full_like(call.tensor("self"), torch.nan)}
    assert torch.equal(call.func(**lost), call.first_out)
    read = {"grad_output", "indices"} & call.arguments.keys()
    sizes = [call.tensor(each) for each in sorted(read)]
    assert read_bytes(call) == sum(4 if 0 in t.stride() else t.nbytes for t in sizes)


FREE: dict[str, Callable[[], Tensor]] = {
    "view": lambda: empty(8, 4).view(32),
    "transpose": lambda: empty(8, 4).t(),
    "slice": lambda: empty(8, 4)[1:],
    "expand": lambda: empty(1, 4).expand(8, 4),
    "detach": lambda: empty(8, 4).detach(),
    "allocation": lambda: empty(8, 4),
    "transpose in place": lambda: empty(8, 4).t_(),
    "split": lambda: empty(8, 4).unsafe_split(4)[0],
}


@pytest.mark.parametrize("name", FREE)
def test_views_and_allocations_move_nothing(name: str) -> None:
    call = last(FREE[name])
    assert not moves_bytes(call.func, call.out)
