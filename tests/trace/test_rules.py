"""The tables of operations: FLOPs against torch's own formulas, traffic by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, empty
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mist.errors import TraceError
from mist.facts import Traffic
from mist.graph import OpKind
from mist.trace.flops import RULES, Call, Work, bind, work_of
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
        function().sum().backward()
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


def test_every_rule_is_compared() -> None:
    seen = {call.func.overloadpacket for make in FUNCTIONS.values() for call in record(make).calls}
    assert set(RULES) - seen == CPU_ATTENTION  # counted as 0 by torch: by hand in test_exact


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
