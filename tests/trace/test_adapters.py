"""Adapters of low rank that stand in for a model: what is trained, and what a layer computes."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mist.plans.workload import Attention
from mist.trace.models.adapters import LowRankAdapter, add_adapters
from mist.trace.models.loader import load_model
from mist.trace.models.source import ConfigSource

RANK, LAYERS, WIDTH, FFN = 4, 2, 64, 160
LLAMA = {
    "model_type": "llama", "hidden_size": WIDTH, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": FFN, "vocab_size": 96,
    "num_hidden_layers": LAYERS,
}  # fmt: skip
GPT = {
    "model_type": "gpt2", "n_embd": WIDTH, "n_head": 4, "n_inner": FFN, "vocab_size": 96,
    "n_layer": LAYERS, "n_positions": 64,
}  # fmt: skip
# In and out of every matrix of a layer.
SHAPES = {
    "llama": [(64, 64), (64, 32), (64, 32), (64, 64), (64, 160), (64, 160), (160, 64)],
    "gpt2": [(64, 192), (64, 64), (64, 160), (160, 64)],
}


@pytest.mark.parametrize("config", [LLAMA, GPT], ids=["llama", "gpt2"])
def test_a_rank_of_numbers_for_each_row_and_column_is_trained(config: dict[str, object]) -> None:
    source = ConfigSource(label="tiny", name="tiny", config=config, adapter_rank=RANK)
    model = load_model(source, attention=Attention.FLASH).module
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    shapes = SHAPES[str(config["model_type"])]
    assert trained == LAYERS * RANK * sum(into + out for into, out in shapes)
    assert ConfigSource(label="tiny", name="tiny", config=config).content != source.content


@pytest.mark.parametrize("base", [nn.Linear(6, 10), Conv1D(10, 6)], ids=["Linear", "Conv1D"])
def test_an_adapter_adds_a_product_of_thin_matrices(base: nn.Module) -> None:
    """y = W x + B A x, in real numbers; only A and B have gradients."""
    module = nn.ModuleList([nn.Sequential(base)])
    add_adapters(module, RANK)
    adapter = module[0][0]
    assert isinstance(adapter, LowRankAdapter)
    for part in (adapter.down, adapter.up):
        part.weight = nn.Parameter(torch.randn(part.weight.shape))
    x = torch.randn(3, 6)
    wide = adapter.up.weight @ adapter.down.weight
    torch.testing.assert_close(adapter(x), base(x) + x @ wide.T)
    adapter(x).sum().backward()
    assert {name for name, p in adapter.named_parameters() if p.grad is not None} == {
        "down.weight",
        "up.weight",
    }
