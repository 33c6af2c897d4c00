"""A plain PyTorch decoder, to show what Mist needs from your own model: nothing but build_model().

How the matrices can be split over tensor-parallel ranks is found from the operations.

    mist plan examples/my_transformer.py --gpus 8
"""

import torch
import torch.nn.functional as F
from torch import nn

DIM, NUM_LAYERS, NUM_HEADS, VOCAB_SIZE, MAX_SEQ_LEN = 2048, 24, 16, 32000, 4096


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head_dim = DIM // NUM_HEADS
        self.q_proj = nn.Linear(DIM, DIM, bias=False)
        self.k_proj = nn.Linear(DIM, DIM, bias=False)
        self.v_proj = nn.Linear(DIM, DIM, bias=False)
        self.o_proj = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        batch, seq, _ = x_BSD.shape
        q, k, v = (
            proj(x_BSD).view(batch, seq, -1, self.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out_BHSK = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out_BHSK.transpose(1, 2).reshape(batch, seq, -1))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn_norm, self.attn = nn.RMSNorm(DIM), Attention()
        self.mlp_norm = nn.RMSNorm(DIM)
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        x_BSD = x_BSD + self.attn(self.attn_norm(x_BSD))
        return x_BSD + self.down(F.gelu(self.up(self.mlp_norm(x_BSD))))


class MyTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.max_seq_len = MAX_SEQ_LEN
        self.embed = nn.Embedding(VOCAB_SIZE, DIM)
        self.position = nn.Embedding(MAX_SEQ_LEN, DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(NUM_LAYERS))
        self.norm = nn.RMSNorm(DIM)
        self.head = nn.Linear(DIM, VOCAB_SIZE, bias=False)

    def forward(self, ids_BS: torch.Tensor) -> torch.Tensor:
        positions_S = torch.arange(ids_BS.shape[1], device=ids_BS.device)
        x_BSD = self.embed(ids_BS) + self.position(positions_S)
        for layer in self.layers:
            x_BSD = layer(x_BSD)
        return self.head(self.norm(x_BSD))


def build_model() -> nn.Module:
    return MyTransformer()
