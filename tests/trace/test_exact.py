"""The trace on this CPU's policy against real CPU tensors: not one byte, not one FLOP apart."""

from collections.abc import Sequence

import pytest
import torch
import transformers
from sympy import Expr
from torch import nn

from mist.graph import B, Block, ModelGraph, OpKind, S, SavedTensor, T
from mist.spec import Attention, Precision
from mist.trace import Setting, trace_model
from tests.trace.real import Measured, measure

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


CASES = [
    pytest.param(llama, "model.layers.1", Precision.FP32, torch.float32, id="llama-fp32"),
    pytest.param(llama, "model.layers.1", Precision.BF16, torch.bfloat16, id="llama-bf16"),
    pytest.param(gpt2, "transformer.h.1", Precision.FP32, torch.float32, id="gpt2-fp32"),
    pytest.param(gpt2, "transformer.h.1", Precision.BF16, torch.bfloat16, id="gpt2-bf16"),
]


@pytest.mark.parametrize(("family", "path", "precision", "dtype"), CASES)
def test_block_equals_real_tensors(family, path, precision, dtype) -> None:
    setting = Setting(precision=precision, attention=Attention.FLASH, policy="cpu")
    graph = trace_model(family(dtype, "meta"), setting)
    (block,) = graph.blocks
    real_model = family(dtype, "cpu")
    for b, s in POINTS:
        real = measure(real_model, path, torch.zeros(b, s, dtype=torch.int64))
        traced = block.saved_single if b == 1 else block.saved
        assert saved_bytes(traced, b, s) == real.saved_bytes, (b, s)
        assert gemm_flop(block, "forward", b, s) == real.forward_flop, (b, s)
        assert gemm_flop(block, "backward", b, s) == real.backward_flop, (b, s)
        assert max(at(e, b, s) for e in block.transient_bytes) == real.transient_bytes, (b, s)


def gemm_flop(block: Block, phase: str, b: int, s: int) -> int:
    """Torch counts attention on the CPU as 0."""
    ops = [op for op in block.ops if op.phase == phase and op.kind is OpKind.GEMM]
    return sum(at(op.flop, b, s) for op in ops)
