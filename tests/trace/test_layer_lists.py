"""Layers are found in any layout, by what flows between calls; what each owns is counted."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from mist.model.graph import ModelGraph
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, trace_model
from mist.trace.recording.layer_dependencies import CALLED_AGAIN
from mist.trace.runs import NO_LAYERS, SHARED
from tests.fast_cases import first_fast

WIDTH = 16
SETTING = TraceSetting(precision=Precision.BF16, attention=Attention.FLASH)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(self.norm(x))


LAYER = sum(p.numel() for p in Layer().parameters())


Run = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class Model(nn.Module):
    """An embedding, something in between, and a head."""

    def __init__(self, inner: nn.Module, run: Run) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, WIDTH), nn.Linear(WIDTH, 32)
        self.inner, self.run = inner, run

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.run(self.inner, self.embed(ids)))


def layers(count: int = 4) -> nn.ModuleList:
    return nn.ModuleList(Layer() for _ in range(count))


def in_turn(modules: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for module in modules.children():
        x = in_turn(module, x) if isinstance(module, nn.ModuleList) else module(x)
    return x


def namespace() -> nn.Module:
    """NanoGPT's and LitGPT's: one ModuleDict around all."""
    parts = {"drop": nn.Dropout(0.0), "h": layers(), "last": nn.LayerNorm(WIDTH)}
    return nn.ModuleDict(parts)


def by_range(modules: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for i in range(4):
        x = getattr(modules, str(i))(x)
    return x


LAYOUTS = {
    "namespace": (namespace, in_turn),
    "nested lists": (lambda: nn.ModuleList([layers(2), layers(2)]), in_turn),
    "a sequence of all": (
        lambda: nn.Sequential(nn.Dropout(0.0), *layers(), nn.LayerNorm(WIDTH)),
        lambda modules, x: modules(x),
    ),
    "a range": (layers, by_range),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layers_are_found(name: str) -> None:
    build, run = LAYOUTS[name]
    graph = traced(Model(build(), run))
    assert [(r.count, graph.blocks[r.block].num_params) for r in graph.layers] == [(4, LAYER)]
    assert graph.sequential


def traced(model: nn.Module) -> ModelGraph:
    return trace_model(model.to("meta"), SETTING)


@pytest.mark.slow
def test_modules_beside_each_other_are_no_layers() -> None:
    def beside(modules: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([module(x) for module in modules.children()]).sum(0)

    graph = traced(Model(layers(), beside))
    assert graph.num_layers == 1
    assert NO_LAYERS in graph.notes


@pytest.mark.parametrize("frozen", first_fast([True, False]))
def test_one_block_called_again_is_counted_once(frozen: bool) -> None:
    def again(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        for _ in range(6):
            x = module(x)
        return x

    model = Model(Layer(), again)
    if frozen:
        model.inner.linear.weight.requires_grad = False
    graph = traced(model)
    blocks = [graph.blocks[kind] for kind in graph.layer_kinds()]
    assert [block.num_params for block in blocks] == [LAYER, 0, 0, 0, 0, 0]
    assert len({block.flop("forward") for block in blocks}) == 1
    assert SHARED in graph.notes
    assert graph.calls_again and not graph.sequential
    assert graph.unstaged == CALLED_AGAIN


def test_buffers_codes_and_idle_parameters_are_charged_as_they_are() -> None:
    class Holds(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(10, dtype=torch.int16))
            self.register_buffer("scratch", torch.zeros(3), persistent=False)
            codes = torch.zeros(7, dtype=torch.uint8)
            self.codes = nn.Parameter(codes, requires_grad=False)
            self.idle = nn.Linear(WIDTH, WIDTH, bias=False)

    (block,) = traced(Model(nn.ModuleList(Holds() for _ in range(3)), in_turn)).blocks
    assert block.buffer_bytes == 10 * 2 + 3 * 4 + 7
    assert block.num_params == LAYER + WIDTH**2
    graph = traced(Model(nn.ModuleList(Holds() for _ in range(3)), in_turn))
    assert (
        f"{3 * (WIDTH**2 + 7)} parameters are charged that nothing reads in this batch: "
        "inner.0.codes, inner.0.idle, inner.1.codes and 3 more"
    ) in graph.notes
