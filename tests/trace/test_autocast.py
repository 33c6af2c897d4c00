"""Autocast: on the CPU to the byte, of CUDA which operation runs in which precision."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, empty, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mist.model.graph import OpKind
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, trace_model
from mist.trace.operations.autocast import forward_in
from mist.trace.recording.shim import runs_as
from tests.fast_cases import first_fast
from tests.trace.real import measure, saved_in_a_run
from tests.trace.test_exact import (
    INPUTS,
    PATHS,
    Family,
    at,
    bert,
    flop,
    gpt2,
    llama,
    plain,
    saved_bytes,
    token_ids,
)  # fmt: skip

BF16, F32 = torch.bfloat16, torch.float32
POINTS = [(1, 32), (2, 48), (3, 77)]


def setting(policy: str) -> TraceSetting:
    return TraceSetting(
        precision=Precision.BF16, attention=Attention.FLASH, policy=policy, autocast=True
    )


@pytest.mark.parametrize("family", first_fast([plain, llama, gpt2, bert]))
def test_block_equals_real_tensors(family: Family) -> None:
    """The bf16 copies of weights are saved storages, too: no parameters, and b and s are not in."""
    (block,) = trace_model(family(F32, "meta"), setting("cpu")).blocks
    model = family(F32, "cpu")
    for b, s in POINTS:
        inputs = INPUTS.get(family, token_ids)(b, s)
        real = measure(model, PATHS[family], inputs, autocast=BF16)
        saved = block.saved_single if b == 1 else block.saved
        assert saved_bytes(saved, b, s) == real.saved_bytes, (b, s)
        assert real.saved_bytes == saved_in_a_run(model, PATHS[family], inputs, BF16)
        assert flop(block, "forward", OpKind.GEMM, b, s) == real.forward_flop
        assert flop(block, "backward", OpKind.GEMM, b, s) == real.backward_flop
        assert max(at(size, b, s) for size in block.transient_bytes) == real.transient_bytes


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight(self.weight(x))


def test_a_weight_is_cast_once() -> None:
    model = nn.Sequential(nn.Embedding(64, 32), Twice(), nn.Linear(32, 64))
    block = trace_model(model, setting("cuda")).blocks[1]
    copies = [tensor for tensor in block.saved if not tensor.bytes.free_symbols]
    assert [int(tensor.bytes) for tensor in copies] == [2 * 32 * 32]


x, w = (lambda: empty(4, 8)), (lambda: empty(8, 8))
# From torch's documentation, "CUDA Ops that Autocast to float16 / float32 / to the widest type".
DTYPES: dict[str, tuple[Callable[[], Tensor], torch.dtype]] = {
    "linear": (lambda: F.linear(x(), w()), BF16),
    "matmul": (lambda: x() @ w(), BF16),
    "mm": (lambda: torch.mm(x(), w()), BF16),
    "bmm": (lambda: torch.bmm(empty(2, 4, 8), empty(2, 8, 8)), BF16),
    "addmm": (lambda: torch.addmm(empty(8), x(), w()), BF16),
    "baddbmm": (lambda: torch.baddbmm(empty(2, 4, 8), empty(2, 4, 8), empty(2, 8, 8)), BF16),
    "conv1d": (lambda: F.conv1d(empty(2, 8, 9), empty(4, 8, 3)), BF16),
    "conv2d": (lambda: F.conv2d(empty(2, 8, 9, 9), empty(4, 8, 3, 3)), BF16),
    "sdpa": (lambda: F.scaled_dot_product_attention(*[empty(2, 4, 16, 8)] * 3), BF16),
    "softmax": (lambda: F.softmax(x().bfloat16(), -1), F32),
    "log_softmax": (lambda: x().bfloat16().log_softmax(-1), F32),
    "layer_norm": (lambda: F.layer_norm(x().bfloat16(), (8,)), F32),
    "group_norm": (lambda: F.group_norm(empty(2, 8, 3).bfloat16(), 2), F32),
    "pow": (lambda: x().bfloat16() ** 2, F32),
    "rsqrt": (lambda: torch.rsqrt(x().bfloat16()), F32),
    "exp": (lambda: x().bfloat16().exp(), F32),
    "sum": (lambda: x().bfloat16().sum(), F32),
    "cumsum": (lambda: x().bfloat16().cumsum(0), F32),
    "norm": (lambda: x().bfloat16().norm(), F32),
    "cross_entropy": (lambda: F.cross_entropy(x().bfloat16(), empty(4, dtype=torch.long)), F32),
    "mse_loss": (lambda: F.mse_loss(x().bfloat16(), x().bfloat16()), F32),
    "gelu": (lambda: F.gelu(x().bfloat16()), BF16),
    "mean": (lambda: x().bfloat16().mean(), BF16),
    "add": (lambda: x().bfloat16() + x(), F32),
    "cat": (lambda: torch.cat((x().bfloat16(), x())), F32),
    "stack": (lambda: torch.stack((x().bfloat16(), x())), F32),
}


@pytest.mark.parametrize("name", DTYPES)
def test_precision_of_an_operation_on_cuda(name: str) -> None:
    function, dtype = DTYPES[name]
    with FakeTensorMode(), runs_as(setting("cuda")), forward_in(BF16):
        assert function().dtype is dtype
