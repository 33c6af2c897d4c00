"""A layer of each kind of every family against real CPU tensors: saved bytes and FLOPs, exact.

Lengths lie on both sides of a window and of a chunk of 64 tokens. Torch's counter has no formula
for attention on a CPU or for experts, and a wrong one for the gradients of grouped convolutions:
those are written out here, by hand or by torch's own for other devices.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import sdpa_backward_flop, sdpa_flop

from mist.exec.build.empty_weights import load
from mist.model.graph import Block, ModelGraph, OpKind
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, load_graph
from mist.trace.models.image_inputs import placed
from mist.trace.models.loader import LoadedModel
from mist.trace.models.model_inputs import parameters_of
from tests.tiny_families import CONFIGS, write_family
from tests.trace.real import convolution_gradients, measure
from tests.trace.test_exact import flop, saved_bytes

aten = torch.ops.aten
Shape = torch.Size

POINTS = [(1, 32), (2, 48), (3, 77), (4, 128), (2, 257)]
# Of scans by chunks: shorter than one, one less than a chunk, several whole ones.
CHUNKED = [(1, 32), (2, 48), (3, 63), (4, 128), (2, 192)]
SCANS = {"mamba2", "bamba"}
# Layers of these hold on to tensors of the run before: not alone to be run backward twice; or keep
# what others made (`test_written_mappings`).
FAMILIES = [name for name in CONFIGS if name not in {"granite4-h", "llava", "internvl", "gemma4"}]


def experts(rows: Shape, matrices: Shape, *_: object, **__: object) -> int:
    """Each row meets the matrix of one expert; or the gradient of each matrix, from its rows."""
    return 2 * rows[0] * rows[1] * matrices[-1]


def attention(q: Shape, k: Shape, v: Shape, *_: object, **__: object) -> int:
    return sdpa_flop(q, k, v)


def attention_backward(grad: Shape, q: Shape, k: Shape, v: Shape, *_: object, **__: object) -> int:
    return sdpa_backward_flop(grad, q, k, v)


FORMULAS = {
    aten._grouped_mm: experts,
    aten._scaled_dot_product_flash_attention_for_cpu: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    aten.convolution_backward: convolution_gradients,
}


def drawn(name: str, folder: Path) -> LoadedModel:
    """The model with values on this CPU."""
    loaded = load(str(write_family(name, folder)), Attention.FLASH)
    drawn: dict[int, nn.Parameter] = {}
    for module in loaded.module.modules():
        for own, parameter in list(module._parameters.items()):
            if parameter is not None:
                value = nn.Parameter(0.02 * torch.randn(parameter.shape), parameter.requires_grad)
                module._parameters[own] = drawn.setdefault(id(parameter), value)
    loaded.module.train()
    return loaded


def batch_of(loaded: LoadedModel, b: int, s: int) -> dict[str, Any]:
    """Zeros in the shapes that the model asks for, and no cache for generation."""
    batch = loaded.batch(b, s)
    if loaded.images:
        batch = placed(loaded.module, batch, torch.zeros(b, s, dtype=torch.int64), loaded.images)
    batch = tree_map_only(
        torch.Tensor, _zeros_or_noise if loaded.images else torch.zeros_like, batch
    )
    asked = parameters_of(loaded.module)
    named = batch if isinstance(batch, dict) else {next(iter(asked)): batch}
    return named | ({"use_cache": False} if "use_cache" in asked else {})


def _zeros_or_noise(tensor: torch.Tensor) -> torch.Tensor:
    """Noise for images: one that is all zeros is taken for padding. Integers as they are."""
    return torch.randn(tensor.shape) if tensor.is_floating_point() else tensor


def layers_of(model: nn.Module, graph: ModelGraph) -> Iterator[tuple[str, Block]]:
    """The first layer of each kind: its name in the model, and what is known of it."""
    left, known = dict(model.named_modules()), set[int]()
    for kind in graph.layer_kinds():
        block = graph.blocks[kind]
        name = next((n for n, module in left.items() if is_of(module, block)), None)
        if name is not None:
            del left[name]
            if kind not in known:
                yield name, block
            known.add(kind)


def is_of(module: nn.Module, block: Block) -> bool:
    """Whether a module has the class and the parameters of a block."""
    own = {(name, parameter.numel()) for name, parameter in module.named_parameters()}
    known = {(parameter.name, parameter.numel) for parameter in block.params}
    return type(module).__name__ == block.name and own == known


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAMILIES, "nanogpt", "dit"])
def test_layers_of_a_family_equal_real_tensors(name: str, tmp_path: Path) -> None:
    loaded, graphs = drawn(name, tmp_path), list[ModelGraph]()
    for b, s in CHUNKED if name in SCANS else POINTS:
        graph = next((each for each in graphs if s in each.lengths), None)
        if graph is None:
            setting = TraceSetting(
                precision=Precision.FP32, attention=Attention.FLASH, policy="cpu", seq_len=s
            )
            graph = load_graph(
                str(write_family(name, tmp_path)), setting, progress=lambda message: None
            )
            graphs.append(graph)
        batch = batch_of(loaded, b, s)
        layers = list(layers_of(loaded.module, graph))
        assert layers
        for path, block in layers:
            real = measure(loaded.module, path, batch, formulas=FORMULAS)
            assert (
                saved_bytes(block.saved_single if b == 1 else block.saved, b, s),
                sum(flop(block, "forward", kind, b, s) for kind in OpKind),
                sum(flop(block, "backward", kind, b, s) for kind in OpKind),
            ) == (real.saved_bytes, real.forward_flop, real.backward_flop), (path, b, s)
