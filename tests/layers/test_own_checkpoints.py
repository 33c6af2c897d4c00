"""A model's own checkpoints are undone, in both forms; those of a plan are not."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

from mist.layers.own_checkpoints import (
    PlannedCheckpoint,
    own_checkpoints,
    switch_off,
    undone_checkpoints,
)
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, trace_model
from mist.trace.runs import OWN_CHECKPOINTS

BF16 = TraceSetting(precision=Precision.BF16, attention=Attention.FLASH)
FORMS = pytest.mark.parametrize("reentrant", [True, False])


class Counted(nn.Module):
    """Counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x).relu()


@FORMS
def test_nothing_runs_again(reentrant: bool) -> None:
    module, x = Counted(), torch.ones(2, 4, requires_grad=True)
    with undone_checkpoints() as functions:
        checkpoint(module, x, use_reentrant=reentrant).sum().backward()
    assert module.calls == 1 and functions == [module]
    checkpoint(module, x, use_reentrant=reentrant).sum().backward()
    assert module.calls == 3  # outside, torch's own way is back


def test_what_a_plan_checkpoints_runs_again() -> None:
    """A layer's own checkpoint within is undone each time."""
    module, x = Counted(), torch.ones(2, 4, requires_grad=True)
    inner = partial(checkpoint, module, use_reentrant=False)
    with undone_checkpoints():
        out = checkpoint(PlannedCheckpoint(inner), x, use_reentrant=False)
    out.sum().backward()
    assert module.calls == 2


class Blocks(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(3)
        )
        self.reentrant = reentrant

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            if self.reentrant is None:
                x = x + layer(x)
            else:
                x = x + checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.head(x)


@FORMS
def test_a_model_is_traced_as_if_it_checkpointed_nothing(reentrant: bool) -> None:
    with torch.device("meta"):
        models = Blocks(None), Blocks(reentrant)
    plain, own = (trace_model(model, BF16) for model in models)
    assert own.blocks == plain.blocks and own.layers == plain.layers
    assert set(own.notes) - set(plain.notes) == {OWN_CHECKPOINTS}


@pytest.mark.slow
def test_checkpointing_of_transformers_is_switched_off() -> None:
    """Of every second layer, with offload: neither is the plan's."""
    with torch.device("meta"):
        plain, own = (
            GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32))
            for _ in range(2)
        )
    own.activation_checkpointing_enable(every_n_layers=2, offload=True)
    costs, checkpointed = (trace_model(model, BF16) for model in (plain, own))
    assert checkpointed.blocks == costs.blocks and checkpointed.layers == costs.layers
    assert set(checkpointed.notes) - set(costs.notes) == {OWN_CHECKPOINTS}
    assert own_checkpoints(own)
    switch_off(own)
    assert not own_checkpoints(own)
