"""Experts that take a share of the tokens: their sizes go with the batch and the length."""

import torch
import torch.nn.functional as F
from torch import nn

from mist.model.graph import OpKind
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, trace_model
from tests.trace.real import measure
from tests.trace.test_exact import flop, saved_bytes

NUM_EXPERTS, WIDTH = 4, 8
FP32 = TraceSetting(precision=Precision.FP32, attention=Attention.FLASH, policy="cpu")


class Switch(nn.Module):
    """Routing as in GShard and Switch Transformers: one-hot in expert and place."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, NUM_EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(NUM_EXPERTS, WIDTH, 2 * WIDTH))
        self.down = nn.Parameter(torch.randn(NUM_EXPERTS, 2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, 1)
        capacity = tokens.shape[0] * 2 // NUM_EXPERTS
        weight, expert = self.gate(tokens).softmax(-1).max(-1)
        chosen = F.one_hot(expert, NUM_EXPERTS)
        place = ((chosen.cumsum(0) * chosen).sum(-1) - 1).clamp(max=capacity - 1)
        sent = chosen.to(x.dtype)[:, :, None] * F.one_hot(place, capacity).to(x.dtype)[:, None]
        given = torch.einsum("tec,td->ecd", sent, tokens)
        made = torch.bmm(F.relu(torch.bmm(given, self.up)), self.down)
        return x + torch.einsum("tec,ecd->td", sent * weight[:, None, None], made).view(x.shape)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, WIDTH), nn.Linear(WIDTH, 32)
        self.layers = nn.ModuleList(Switch() for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_experts_with_a_capacity_are_exact() -> None:
    with torch.device("meta"):
        model = Net()
    (block,) = trace_model(model, FP32).blocks
    real = Net()
    for b, s in ((1, 400), (2, 512)):
        seen = measure(real, "layers.0", {"ids": torch.zeros(b, s, dtype=torch.int64)})
        assert saved_bytes(block.saved_single if b == 1 else block.saved, b, s) == seen.saved_bytes
        assert flop(block, "forward", OpKind.GEMM, b, s) == seen.forward_flop
        assert flop(block, "backward", OpKind.GEMM, b, s) == seen.backward_flop
