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
from mist.facts import Traffic
from mist.graph import OpKind
from mist.trace.call import Call, bind
from mist.trace.flops import RULES, Work, _is_heavy, work_of
from mist.trace.traffic import moves_bytes, read_bytes, traffic_class, written_bytes

aten = torch.ops.aten
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
}


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
    "flash": flash,
    "efficient": efficient,
    "cudnn": cudnn,
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
    assert set(RULES) - seen == CPU_ATTENTION  # counted as 0 by torch: by hand in test_exact


@pytest.mark.parametrize("name", ["convert_element_type", "upsample_bilinear2d", "_weight_norm"])
def test_names_that_only_look_heavy(name: str) -> None:
    assert not _is_heavy(name)


@pytest.mark.parametrize("name", ["_int_mm", "cudnn_convolution", "_cdist_forward", "lstm"])
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


def last(function: Callable[[], Tensor]) -> Call:
    with FakeTensorMode(), torch.no_grad(), Calls() as calls:
        function()
    return calls.calls[-1]


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


FREE: dict[str, Callable[[], Tensor]] = {
    "view": lambda: empty(8, 4).view(32),
    "transpose": lambda: empty(8, 4).t(),
    "slice": lambda: empty(8, 4)[1:],
    "expand": lambda: empty(1, 4).expand(8, 4),
    "detach": lambda: empty(8, 4).detach(),
    "allocation": lambda: empty(8, 4),
}


@pytest.mark.parametrize("name", FREE)
def test_views_and_allocations_move_nothing(name: str) -> None:
    call = last(FREE[name])
    assert not moves_bytes(call.func, call.out)
