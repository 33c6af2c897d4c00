"""Layers that run again but for some results: what two in a row keep, and the gradients they give.

The expressions come from the trace of the plain model; the bytes from tensors that are alive.
"""

import re

import pytest
import torch
from sympy import Expr
from torch import nn

from mist.exec.build.activations import ATTENTION_KERNELS, PRODUCTS, apply_memory_level
from mist.model.graph import B, S, T
from mist.plans.memory_levels import KEEPS_ALL, LEVELS, levels_that
from mist.plans.workload import MemoryLevel, Precision
from mist.platform.profiles import load_runtime
from mist.symbolic.block import layer_cost
from mist.symbolic.level_cost import level_costs
from mist.trace.operations.flops import RULES
from tests.layers.families import without_dropout
from tests.layers.test_bytes import DTYPES, LAYERS, MODELS, block_of, built, stacked
from tests.layers.test_surgery import gradient
from tests.tokens import tokens
from tests.toys import adamw_setting

TORCH = adamw_setting(load_runtime("torch").profile)
KEPT = levels_that(lambda row: row.product_stride is not None)
SOME_PRODUCTS = max(KEPT, key=lambda level: LEVELS[level].product_stride or 0)


def with_level(family: str, level: MemoryLevel, precision: Precision) -> nn.Module:
    """A model on this CPU whose layers run again as a plan says."""
    model = built(family, "none", "byte", DTYPES[precision], "cpu")
    for layer in model.get_submodule(LAYERS.get(family, "model.layers")).children():
        apply_memory_level(layer, level)
    return model


def kept_bytes(family: str, level: MemoryLevel, precision: Precision) -> Expr:
    cost = layer_cost(block_of(family, "none", "byte", precision), TORCH)
    levels = level_costs(cost, TORCH.runtime, is_layer=True)
    return next(each.kept_bytes for each in levels if each.name == level.column)


FAST = ("llama", SOME_PRODUCTS, Precision.BF16)
CASES = [
    pytest.param(*case, marks=() if case == FAST else pytest.mark.slow)
    for family in MODELS
    for level in KEPT
    for precision in DTYPES
    for case in [(family, level, precision)]
]


@pytest.mark.parametrize(("family", "level", "precision"), CASES)
def test_two_layers_keep_what_the_expression_says(
    family: str, level: MemoryLevel, precision: Precision
) -> None:
    expected, model = kept_bytes(family, level, precision), with_level(family, level, precision)
    for b, s in ((1, 32), (2, 33), (3, 64)):
        _, alive, _ = stacked(model, LAYERS.get(family, "model.layers"), b, s)
        values = {B: b, S: s, T: 1} | tokens(1, 1)
        assert alive == 2 * int(expected.subs(values)), (b, s)


def test_the_program_keeps_what_the_trace_counts_as_products() -> None:
    """Less transforms, which are none, backward passes, and results in the place of an operand."""
    names = {packet.__name__ for packet in RULES}
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
