"""The trace on this CPU's policy against real CPU tensors: not one byte, not one FLOP apart."""

from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
import transformers
from sympy import Expr
from torch import nn

from mist.model.graph import B, Block, ModelGraph, OpKind, S, SavedTensor, T
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, trace_model
from tests.tokens import tokens
from tests.trace.real import Measured, measure
from tests.trace.test_repeated_blocks import Layer, Model

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


def mixtral(dtype: torch.dtype, device: str) -> nn.Module:
    """Eight experts, two a token. Routing is done in fp32 whatever the dtype."""
    config = transformers.MixtralConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    return build(config, dtype, device)


def bert(dtype: torch.dtype, device: str) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    with torch.device(device):
        return transformers.BertForMaskedLM._from_config(config, dtype=dtype).train()


def plain(dtype: torch.dtype, device: str) -> nn.Module:
    with torch.device(device):
        return Model([Layer(i, dropout=0.1) for i in range(2)]).to(dtype)


def build(config: object, dtype: torch.dtype, device: str) -> nn.Module:
    with torch.device(device):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.train()


@cache
def family_graph(family: Family, dtype: torch.dtype, setting: TraceSetting) -> ModelGraph:
    """The trace of a family, made once for all tests that compare it with something real."""
    return trace_model(family(dtype, "meta"), setting)


# No tensor parallelism.
ALONE = {T: 1} | tokens(1, 1)


def at(expr: Expr, b: int, s: int) -> int:
    return int(expr.subs({B: b, S: s} | ALONE))


def saved_bytes(tensors: Sequence[SavedTensor], b: int, s: int) -> int:
    return sum(at(tensor.bytes, b, s) for tensor in tensors)


def token_ids(b: int, s: int, **more: object) -> dict[str, object]:
    return {"input_ids": torch.zeros(b, s, dtype=torch.int64), "use_cache": False, **more}


SLOW = pytest.mark.slow
CASES = [
    pytest.param(llama, Precision.FP32, id="llama-fp32", marks=SLOW),
    pytest.param(llama, Precision.BF16, id="llama-bf16"),
    pytest.param(gpt2, Precision.FP32, id="gpt2-fp32", marks=SLOW),
    pytest.param(gpt2, Precision.BF16, id="gpt2-bf16", marks=SLOW),
    pytest.param(mixtral, Precision.FP32, id="mixtral-fp32", marks=SLOW),
    pytest.param(mixtral, Precision.BF16, id="mixtral-bf16", marks=SLOW),
    pytest.param(bert, Precision.FP32, id="bert-fp32", marks=SLOW),
    pytest.param(bert, Precision.BF16, id="bert-bf16", marks=SLOW),
    pytest.param(plain, Precision.FP32, id="plain-fp32"),
    pytest.param(plain, Precision.BF16, id="plain-bf16", marks=SLOW),
]
PATHS = {
    llama: "model.layers.1",
    gpt2: "transformer.h.1",
    mixtral: "model.layers.1",
    bert: "bert.encoder.layer.1",
    plain: "layers.1",
}
INPUTS = {
    bert: lambda b, s: {"input_ids": torch.zeros(b, s, dtype=torch.int64)},
    plain: lambda b, s: {"ids": torch.zeros(b, s, dtype=torch.int64)},
}
# Torch counts attention on the CPU as 0, and experts not at all. By hand: heads times head size
# 128, q k^T and p v forward; both once more for each gradient and the scores again backward. GPT-2
# and BERT have dropout in attention, which is math on a CPU. Experts: 2 a token, each a matrix of
# 128 x 2 * 64 and one of 64 x 128.
HIDDEN = {llama: 128, mixtral: 128}
EXPERTS = {mixtral: 2 * (2 * 128 * 128 + 2 * 64 * 128)}


@pytest.mark.parametrize(("family", "precision"), CASES)
def test_block_equals_real_tensors(family: Family, precision: Precision) -> None:
    setting = TraceSetting(precision=precision, attention=Attention.FLASH, policy="cpu")
    dtype = torch.float32 if precision is Precision.FP32 else torch.bfloat16
    (block,) = family_graph(family, dtype, setting).blocks
    model = family(dtype, "cpu")
    for b, s in POINTS:
        real = measure(model, PATHS[family], INPUTS.get(family, token_ids)(b, s))
        saved = saved_bytes(block.saved_single if b == 1 else block.saved, b, s)
        experts = b * s * EXPERTS.get(family, 0)
        traced = Measured(
            saved_bytes=saved,
            live_bytes=saved,
            transient_bytes=max(at(size, b, s) for size in block.transient_bytes),
            transient_with_grads_bytes=max(
                at(size, b, s) for size in block.transient_with_grads_bytes
            ),
            transient_adding_bytes=max(at(size, b, s) for size in block.transient_adding_bytes),
            forward_flop=flop(block, "forward", OpKind.GEMM, b, s) - experts,
            backward_flop=flop(block, "backward", OpKind.GEMM, b, s) - 2 * experts,
        )
        assert traced == real, (b, s)
        attention = 4 * b * s**2 * HIDDEN.get(family, 0)
        assert flop(block, "forward", OpKind.ATTENTION, b, s) == attention
        assert flop(block, "backward", OpKind.ATTENTION, b, s) == attention * 5 // 2


def flop(block: Block, phase: str, kind: OpKind, b: int, s: int) -> int:
    ops = [op for op in block.ops if op.phase == phase and op.kind is kind]
    return sum(at(op.flop, b, s) for op in ops)
