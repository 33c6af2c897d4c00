"""A graph network: every edge sends a message, every node adds up what it gets.

Battaglia et al. 2018 (arXiv 1806.01261) as in mesh-based simulation. The sequence length is the
number of nodes of a graph: mist plan examples/gnn.py --gpus 8 --gpu l4 --seq 2048
"""

import torch
import torch.nn.functional as F
from torch import nn

FEATURES, WIDTH, LAYERS, EDGES_PER_NODE = 16, 512, 12, 8


def mlp(inputs: int, width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.LayerNorm(width)
    )


class MessagePassing(nn.Module):
    """Nodes [b * n, w] and the edges [2, e] between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.message = mlp(2 * width, width)
        self.update = mlp(2 * width, width)

    def forward(self, nodes: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        source, target = edges[0], edges[1]
        messages = self.message(torch.cat((nodes[source], nodes[target]), dim=1))
        received = torch.zeros_like(nodes).index_add(0, target, messages)
        return nodes + self.update(torch.cat((nodes, received), dim=1))


class GraphNetwork(nn.Module):
    """A prediction for every node."""

    def __init__(self, width: int = WIDTH, layers: int = LAYERS) -> None:
        super().__init__()
        self.encode = nn.Linear(FEATURES, width)
        self.layers = nn.ModuleList(MessagePassing(width) for _ in range(layers))
        self.decode = nn.Linear(width, 1)

    def forward(self, features: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        nodes = self.encode(features)
        for layer in self.layers:
            nodes = layer(nodes, edges)
        return self.decode(nodes)


def build_model() -> nn.Module:
    return GraphNetwork()


def make_batch(batch: int, seq: int) -> dict[str, torch.Tensor]:
    """Graphs side by side as one large graph, each node with EDGES_PER_NODE edges."""
    nodes = batch * seq
    return {
        "features": torch.zeros(nodes, FEATURES),
        "edges": torch.zeros(2, EDGES_PER_NODE * nodes, dtype=torch.int64),
    }


def loss(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.mse_loss(output.float(), torch.zeros_like(output, dtype=torch.float32))
