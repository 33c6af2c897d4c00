"""The examples that are no transformers: a small one of each against real tensors on this CPU."""

import importlib.util
from collections.abc import Callable
from functools import cache
from math import log2
from pathlib import Path
from types import ModuleType

import pytest
import sympy
import torch
from torch import nn

from mist.model.graph import B, ModelGraph, OpKind, S
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, trace_model
from tests.trace.real import Measured, measure
from tests.trace.test_exact import at, flop, saved_bytes

EXAMPLES = Path(__file__).parents[2] / "examples"
FP32 = TraceSetting(precision=Precision.FP32, attention=Attention.FLASH, policy="cpu")
CHANNELS, MODES = 8, 4


def example(stem: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{stem}", EXAMPLES / f"{stem}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SMALL: dict[str, Callable[[ModuleType], nn.Module]] = {
    "fno": lambda module: module.FourierNeuralOperator(CHANNELS, MODES, layers=2),
    "gnn": lambda module: module.GraphNetwork(width=16, layers=2),
    "unet": lambda module: module.UNet(widths=(4, 8, 16)),
}


def small(stem: str, device: str) -> nn.Module:
    with torch.device(device):
        return SMALL[stem](example(stem)).train()


@cache
def traced(stem: str) -> ModelGraph:
    module = example(stem)
    batches = {"make_batch": module.make_batch, "loss": module.loss}
    return trace_model(small(stem, "meta"), FP32, **batches)


def complex_flop(b: int) -> int:
    """Products of complex numbers of one layer of the operator: 8 FLOPs, of which torch counts 2.

    For each of 2 M^2 frequencies a matrix of C x C.
    """
    return 8 * b * 2 * MODES**2 * CHANNELS**2


LAYERS = {
    "fno": [("layers.1", 0)],
    "gnn": [("layers.1", 0)],
    "unet": [("down.0", 0), ("down.1", 1), ("up.0", 2), ("up.1", 3)],
}
POINTS = [(1, 16), (2, 24), (3, 32)]
CASES = [
    pytest.param(stem, *layer, marks=[pytest.mark.slow] * (i > 0 or stem == "unet"))
    for stem, layers in LAYERS.items()
    for i, layer in enumerate(layers)
]


@pytest.mark.parametrize(("stem", "path", "kind"), CASES)
def test_layer_equals_real_tensors(stem: str, path: str, kind: int) -> None:
    graph, model = traced(stem), small(stem, "cpu")
    block = graph.blocks[kind]
    for b, s in POINTS:
        real = measure(model, path, example(stem).make_batch(b, s))
        saved = saved_bytes(block.saved_single if b == 1 else block.saved, b, s)
        uncounted = complex_flop(b) * 3 // 4 if stem == "fno" else 0
        assert real == Measured(
            saved_bytes=saved,
            live_bytes=saved,
            transient_bytes=max(0, *(at(size, b, s) for size in block.transient_bytes)),
            transient_with_grads_bytes=max(
                0, *(at(size, b, s) for size in block.transient_with_grads_bytes)
            ),
            transient_adding_bytes=max(
                0, *(at(size, b, s) for size in block.transient_adding_bytes)
            ),
            forward_flop=flop(block, "forward", OpKind.GEMM, b, s) - uncounted,
            backward_flop=flop(block, "backward", OpKind.GEMM, b, s) - 2 * uncounted,
        ), (b, s)


def test_transforms_of_the_operator() -> None:
    """rfft2 and irfft2 of C real fields of s^2 points: 2.5 s^2 log2 s^2 each.

    Backward of the first: a whole complex transform and a real one; of the second: a real one.
    """
    (block,) = traced("fno").blocks
    b, s = 2, 64
    real = 2.5 * b * CHANNELS * s**2 * log2(s**2)
    fft = [op for op in block.ops if op.kind is OpKind.MEMORY and op.flop != 0]
    done = {
        phase: [float(op.flop.subs({B: b, S: s})) for op in fft if op.phase == phase]
        for phase in ("forward", "backward")
    }
    assert done["forward"] == pytest.approx([real, real])
    assert sorted(done["backward"]) == pytest.approx([real, 2 * real])


@pytest.mark.slow
def test_skip_connections_forbid_pipelines() -> None:
    graph = traced("unet")
    assert not graph.sequential
    assert graph.notes[0] == (
        "layers exchange tensors with layers that are not their neighbours (skip connections): one "
        "pipeline stage only"
    )
    assert traced("gnn").sequential


def test_sides_that_can_be_halved() -> None:
    """Two levels down: the side is a multiple of 4, and its quarter is more than one pixel."""
    relations = [each for each in traced("unet").embed.domain if each.free_symbols == {S}]
    assert relations == [sympy.Eq(sympy.Mod(S, 4), 0), S >= 8]
