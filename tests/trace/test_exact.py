"""The trace on this CPU's policy against real CPU tensors: not one byte, not one FLOP apart."""

from collections.abc import Callable, Sequence

import pytest
import torch
import transformers
from sympy import Expr
from torch import nn

from mist.graph import B, Block, OpKind, S, SavedTensor, T
from mist.spec import Attention, Precision
from mist.trace import Setting, trace_model
from tests.trace.real import Measured, measure

Family = Callable[[torch.dtype, str], nn.Module]
POINTS = [(1, 32), (2, 48), (3, 77), (4, 128), (2, 257)]


def llama(dtype: torch.dtype, device: str) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return build(config, dtype, device)


def gpt2(dtype: torch.dtype, device: str) -> nn.Module:
    config = transformers.GPT2Config(vocab_size=512, n_embd=128, n_layer=2, n_head=4)
    return build(config, dtype, device)


def build(config: object, dtype: torch.dtype, device: str) -> nn.Module:
    with torch.device(device):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.train()


def at(expr: Expr, b: int, s: int) -> int:
    return int(expr.subs({B: b, S: s, T: 1}))


def saved_bytes(tensors: Sequence[SavedTensor], b: int, s: int) -> int:
    return sum(at(tensor.bytes, b, s) for tensor in tensors)


SLOW = pytest.mark.slow
CASES = [
    pytest.param(llama, Precision.FP32, id="llama-fp32", marks=SLOW),
    pytest.param(llama, Precision.BF16, id="llama-bf16"),
    pytest.param(gpt2, Precision.FP32, id="gpt2-fp32"),
    pytest.param(gpt2, Precision.BF16, id="gpt2-bf16", marks=SLOW),
]
PATHS = {llama: "model.layers.1", gpt2: "transformer.h.1"}


@pytest.mark.parametrize(("family", "precision"), CASES)
def test_block_equals_real_tensors(family: Family, precision: Precision) -> None:
    setting = Setting(precision=precision, attention=Attention.FLASH, policy="cpu")
    dtype = torch.float32 if precision is Precision.FP32 else torch.bfloat16
    (block,) = trace_model(family(dtype, "meta"), setting).blocks
    model = family(dtype, "cpu")
    for b, s in POINTS:
        real = measure(model, PATHS[family], torch.zeros(b, s, dtype=torch.int64))
        traced = Measured(
            saved_bytes=saved_bytes(block.saved_single if b == 1 else block.saved, b, s),
            transient_bytes=max(at(size, b, s) for size in block.transient_bytes),
            forward_flop=flop(block, "forward", OpKind.GEMM, b, s),
            backward_flop=flop(block, "backward", OpKind.GEMM, b, s),
        )
        assert traced == real, (b, s)
        # Torch counts attention on the CPU as 0. By hand: 8 heads of 16, q k^T and p v forward;
        # both once more for each gradient and the scores again backward. GPT-2 has dropout: math.
        attention = 4 * b * s**2 * 128 if family is llama else 0
        assert flop(block, "forward", OpKind.ATTENTION, b, s) == attention
        assert flop(block, "backward", OpKind.ATTENTION, b, s) == attention * 5 // 2


def flop(block: Block, phase: str, kind: OpKind, b: int, s: int) -> int:
    ops = [op for op in block.ops if op.phase == phase and op.kind is kind]
    return sum(at(op.flop, b, s) for op in ops)
