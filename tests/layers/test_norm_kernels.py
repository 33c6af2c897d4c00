"""The two operations of an RMS norm: what they compute, and as which kernels a trace sees them."""

import pytest
import torch
from torch import Tensor, nn
from torch._decomp import decomposition_table

from mist.layers import convert_layer
from mist.layers.norm_kernels import rms_norm, rms_norm_gradients
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, trace_model
from tests.layers.test_functions import WIDTH, numbers

aten = torch.ops.aten
EPS = 1e-6
# Sums of 15 rows and 13 columns in fp64, in another order.
CLOSE = 1e-14


def arguments(scaled: bool) -> tuple[Tensor, Tensor | None]:
    return numbers(5, 3, WIDTH), numbers(WIDTH, seed=1) if scaled else None


@pytest.mark.parametrize("scaled", [True, False])
def test_as_the_kernel_of_torch(scaled: bool) -> None:
    x, scale = arguments(scaled)
    for found, expected in zip(
        rms_norm(x, scale, EPS), aten._fused_rms_norm(x, [WIDTH], scale, EPS), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("scaled", [True, False])
def test_gradients_as_the_kernel_of_torch(scaled: bool, needs: tuple[bool, bool]) -> None:
    """The kernel itself runs on GPUs; what torch says that it computes runs here."""
    (x, scale), grad = arguments(scaled), numbers(5, 3, WIDTH, seed=2)
    needs = needs if scaled else (needs[0], False)
    _, rstd = rms_norm(x, scale, EPS)
    backward = decomposition_table[aten._fused_rms_norm_backward.default]
    expected = backward(grad, x, [WIDTH], rstd, scale, list(needs))
    found = rms_norm_gradients(grad, x, rstd, scale, needs)
    assert [each is not None for each in found] == list(needs)
    for ours, theirs in zip(found, expected, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=CLOSE, atol=CLOSE)


class Normed(nn.Module):
    """A norm that rounds before it scales, as Llama's, and a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH, device="meta", dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return self.weight * (wide * rstd).to(x.dtype)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Normed()
        self.matrix = nn.Linear(WIDTH, WIDTH, device="meta", dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.matrix(self.norm(x))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, WIDTH, device="meta", dtype=torch.bfloat16)
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def norms_of(policy: str) -> list[str]:
    model = Stack()
    for layer in model.layers:
        convert_layer(layer, "drop-norm")
    setting = TraceSetting(precision=Precision.BF16, attention=Attention.FLASH, policy=policy)
    block = trace_model(model, setting).blocks[0]
    return [op.name for op in block.ops if "rms_norm" in op.name]


def test_a_gpu_runs_a_kernel_each_way_and_one_to_make_the_result_again() -> None:
    forward, backward = "mist.fused_rms_norm", "mist.fused_rms_norm_backward"
    assert norms_of("cuda") == [forward, forward, backward]


def test_a_cpu_runs_them_in_parts() -> None:
    assert norms_of("cpu") == []
