"""Megatron's selective level on a GPT layer: Korthikanti et al. 2022, equations 1, 2 and 6."""

import pytest
import sympy
import torch
import transformers
from sympy import Expr
from sympy.core.function import AppliedUndef

from mist.model.graph import B, Block, S, T
from mist.plans.workload import Attention, Precision
from mist.platform.profiles import load_runtime
from mist.symbolic import symbols as sym
from mist.symbolic.block import layer_cost
from mist.symbolic.level_cost import LevelCost, level_costs
from mist.trace import TraceSetting, trace_model
from tests.toys import adamw_setting
from tests.trace.test_exact import build

MEGATRON = adamw_setting(load_runtime("megatron").profile)
WIDTH, HEADS, SAMPLES, TOKENS = 128, 4, 3, 256
STATISTICS = 2 * 2 * 4  # per token: mean and deviation of two norms in fp32, which the paper omits
RNG_STATE = 24  # per layer: seeds and offsets of dropout


@pytest.fixture(scope="module")
def gpt() -> Block:
    """A layer as in the paper: GELU is one operation, dropout stands in three places."""
    config = transformers.GPT2Config(
        vocab_size=512, n_embd=WIDTH, n_layer=2, n_head=HEADS, activation_function="gelu"
    )
    setting = TraceSetting(precision=Precision.BF16, attention=Attention.MATH)
    (block,) = trace_model(build(config, torch.bfloat16, "meta"), setting).blocks
    return block


def of_level(block: Block, name: str) -> LevelCost:
    """A level of a layer under Megatron, which divides tokens too."""
    rows = level_costs(layer_cost(block, MEGATRON), MEGATRON.runtime, is_layer=True)
    return next(level for level in rows if level.name == name)


def value(expr: Expr, tp: int) -> float:
    numbers = expr.subs({B: SAMPLES, S: TOKENS, T: tp})
    return float(numbers.replace(sympy.Function("maximum"), sympy.Max))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_selective_keeps_34_bytes_of_a_token_and_hidden_unit(gpt: Block, tp: int) -> None:
    """Equation 6, 34 s b h / t: equation 1 without the 5 a s / h of core attention."""
    kept = value(of_level(gpt, "selective").kept_bytes, tp)
    token = (34 * WIDTH + STATISTICS) * SAMPLES * TOKENS / tp
    assert kept == pytest.approx(token, abs=RNG_STATE)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_none_keeps_the_scores_too(gpt: Block, tp: int) -> None:
    """And the operands in fp32, as torch's own unfused attention works in fp32.

    The paper's scores are 2 bytes: 5 a s^2 b. In fp32 softmax 4, mask 1, what dropout gives 4;
    queries, keys and values 12 s b h in the place of 6. Running a layer again needs them all, and
    runs forward, too.
    """
    eager, selective = (of_level(gpt, name) for name in ("none", "selective"))
    scores = 9 * HEADS * SAMPLES * TOKENS**2 / tp + 6 * WIDTH * SAMPLES * TOKENS / tp
    assert value(eager.kept_bytes - selective.kept_bytes, tp) == pytest.approx(scores)
    working = max(value(size, tp) for size in (eager.working_bytes, eager.forward_bytes))
    assert value(selective.working_bytes, tp) == pytest.approx(working + scores)


def test_core_attention_alone_runs_again(gpt: Block) -> None:
    """Two products of 2 b a s^2 d FLOP, and what lies between them."""
    cost = layer_cost(gpt, MEGATRON)
    products = cost.attention_s.atoms(sym.GEMM)
    assert sum(2 * value(sympy.prod(call.args), 1) for call in products) == (
        4 * SAMPLES * WIDTH * TOKENS**2
    )
    assert {call.func for call in cost.attention_s.atoms(AppliedUndef)} > {sym.GEMM}
    assert of_level(gpt, "selective").recompute_s == cost.attention_s


@pytest.mark.slow
def test_a_kernel_of_its_own_keeps_no_scores() -> None:
    """Flash attention: selective keeps what eager keeps, and runs the kernel again."""
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS
    )
    setting = TraceSetting(precision=Precision.BF16, attention=Attention.FLASH)
    (block,) = trace_model(build(config, torch.bfloat16, "meta"), setting).blocks
    eager, selective = (of_level(block, name) for name in ("none", "selective"))
    assert eager.kept_bytes == selective.kept_bytes
    (law,) = selective.recompute_s.atoms(sym.ATTENTION_FORWARD)
    assert selective.recompute_s == sym.FIGURES["kernels.attention_time_scale"] * law


@pytest.mark.slow
def test_torchtitan_keeps_every_second_product_and_attention() -> None:
    """Per-op mode (activation_checkpoint.py): of a Llama layer's 7 products the 1st, 3rd, 5th, 7th.

    2 bytes a number of queries, values, gate and the last product, of what attention gives and of
    the layer's input, and fp32 statistics of attention for each head.
    """
    width, ffn = 128, 352
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=width, num_hidden_layers=2, num_attention_heads=HEADS,
        intermediate_size=ffn,
    )  # fmt: skip
    setting = TraceSetting(precision=Precision.BF16, attention=Attention.FLASH)
    (block,) = trace_model(build(config, torch.bfloat16, "meta"), setting).blocks
    titan = adamw_setting(load_runtime("torchtitan").profile)
    rows = level_costs(layer_cost(block, titan), titan.runtime, is_layer=True)
    (selective,) = (level for level in rows if level.name == "selective")
    token = 2 * (3 * width + ffn) + 2 * width + 2 * width + 4 * HEADS
    assert value(selective.kept_bytes, 1) == pytest.approx(token * SAMPLES * TOKENS, abs=RNG_STATE)
    again = selective.recompute_s.atoms(sym.GEMM)
    flop = sum(2 * value(sympy.prod(call.args), 1) for call in again)
    # Keys, the output of attention and `up`.
    assert flop == 2 * SAMPLES * TOKENS * width * (2 * width + ffn)
