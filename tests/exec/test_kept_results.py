"""Layers that run again but for some results: what they keep and repeat, and their gradients.

The expressions come from the trace of the plain model; bytes from tensors that are alive, FLOPs
from torch's counter.
"""

import re
from math import prod

import pytest
import torch
from sympy import Expr, Integer
from sympy.core.function import AppliedUndef
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mist.exec.build.activations import ATTENTION_KERNELS, PRODUCTS, apply_memory_level
from mist.model.graph import B, S, T
from mist.plans.memory_levels import KEEPS_ALL, LEVELS, levels_that
from mist.plans.workload import MemoryLevel, Precision
from mist.platform.profiles import load_runtime
from mist.symbolic import symbols as sym
from mist.symbolic.block import IN_KERNELS, layer_cost
from mist.symbolic.level_cost import LevelCost, level_costs
from mist.trace.operations.flops import RULES
from tests.layers.families import without_dropout
from tests.layers.test_bytes import DTYPES, LAYERS, MODELS, batch_of, block_of, built, stacked
from tests.layers.test_surgery import gradient
from tests.tokens import tokens
from tests.toys import adamw_setting
from tests.trace.real import layer_inputs
from tests.trace.test_families import aten, experts

TORCH = adamw_setting(load_runtime("torch").profile)
KEPT = levels_that(lambda row: row.product_stride is not None)
SOME_PRODUCTS = max(KEPT, key=lambda level: LEVELS[level].product_stride or 0)


def with_level(family: str, level: MemoryLevel, precision: Precision) -> nn.Module:
    """A model on this CPU whose layers run again as a plan says."""
    model = built(family, "none", "byte", DTYPES[precision], "cpu")
    for layer in model.get_submodule(LAYERS.get(family, "model.layers")).children():
        apply_memory_level(layer, level)
    return model


def cost_of(family: str, level: MemoryLevel, precision: Precision) -> LevelCost:
    cost = layer_cost(block_of(family, "none", "byte", precision), TORCH)
    levels = level_costs(cost, TORCH.runtime, is_layer=True, more=KEPT)
    return next(each for each in levels if each.name == level.column)


def product_flop(seconds: Expr) -> Expr:
    """Of the matrix products in a sum of laws; torch's counter counts no attention on a CPU."""
    laws = {call.func for call in seconds.atoms(AppliedUndef)} - {sym.GEMM}
    for law in laws:
        seconds = seconds.replace(law, lambda *_: Integer(0))
    return seconds.replace(sym.GEMM, lambda *dims: 2 * prod(dims))


def backward_flop(model: nn.Module, path: str, b: int, s: int) -> int:
    """Of the first layer, by torch's own counter."""
    layer = model.get_submodule(f"{path}.0")
    (x, *args), kwargs = layer_inputs(model, layer, batch_of(path, b, s))
    y = layer(x.detach().requires_grad_().view_as(x), *args, **kwargs)
    # Torch has no formula for the matrices of experts.
    with FlopCounterMode(display=False, custom_mapping={aten._grouped_mm: experts}) as counter:
        (y[0] if isinstance(y, tuple) else y).sum().backward()
    return counter.get_total_flops()


FAST = ("llama", SOME_PRODUCTS, Precision.BF16)
CASES = [
    pytest.param(*case, marks=() if case == FAST else pytest.mark.slow)
    for family in MODELS
    for level in KEPT
    for precision in DTYPES
    for case in [(family, level, precision)]
]


@pytest.mark.parametrize(("family", "level", "precision"), CASES)
def test_layers_keep_and_repeat_what_the_expressions_say(
    family: str, level: MemoryLevel, precision: Precision
) -> None:
    cost, path = cost_of(family, level, precision), LAYERS.get(family, "model.layers")
    model, plain = (with_level(family, each, precision) for each in (level, KEEPS_ALL))
    for b, s in ((1, 32), (2, 33), (3, 64)):
        _, alive, _ = stacked(model, path, b, s)
        values = {B: b, S: s, T: 1} | tokens(1, 1)
        assert alive == 2 * int(cost.kept_bytes.subs(values)), (b, s)
        again = backward_flop(model, path, b, s) - backward_flop(plain, path, b, s)
        assert again == int(product_flop(cost.recompute_s).subs(values)), (b, s)


def test_the_program_keeps_what_the_trace_counts_as_products() -> None:
    """Less transforms, which are none, backward passes, and results in the place of an operand.

    Checkpointing sees nothing of what runs inside kernels of other packages.
    """
    names = {packet.__name__ for packet in RULES if not str(packet).startswith(IN_KERNELS)}
    others = {name for name in names if re.search("backward|fft|_$", name)}
    assert {packet.__name__ for packet in PRODUCTS | ATTENTION_KERNELS} == names - others


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("level", KEPT)
def test_gradients_are_those_of_the_plain_layer(family: str, level: MemoryLevel) -> None:
    """The same operations on the same numbers: not a bit apart."""
    plain, again = (
        without_dropout(with_level(family, each, Precision.FP32)) for each in (KEEPS_ALL, level)
    )
    for found, expected in zip(gradient(again), gradient(plain), strict=True):
        assert torch.equal(found, expected)
