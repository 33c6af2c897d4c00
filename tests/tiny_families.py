"""One tiny model of each family, that real tensors and real ranks can afford.

Configurations lie in tiny_families.yaml; models that people write by hand are files of Python.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import yaml

from tests.tiny_attention import TORCH_ATTENTION

# nanoGPT's layout: one ModuleDict around all, queries, keys and values in one matrix.
NANOGPT = """
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(64), nn.LayerNorm(64)
        self.c_attn, self.c_proj = nn.Linear(64, 192), nn.Linear(64, 64)
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(64, 256), c_proj=nn.Linear(256, 64)))

    def forward(self, x):
        b, s, h = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).split(64, dim=2)
        q, k, v = (each.view(b, s, 4, h // 4).transpose(1, 2) for each in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(b, s, h))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    block_size = 512

    def __init__(self):
        super().__init__()
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(256, 64), wpe=nn.Embedding(512, 64), drop=nn.Dropout(0.0),
            h=nn.ModuleList(Block() for _ in range(2)), ln_f=nn.LayerNorm(64),
        ))
        self.lm_head = nn.Linear(64, 256, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx):
        t = self.transformer
        x = t.drop(t.wte(idx) + t.wpe(torch.arange(idx.shape[1], device=idx.device)))
        for block in t.h:
            x = block(x)
        return self.lm_head(t.ln_f(x))


def build_model():
    return GPT()
"""
# A diffusion transformer (Peebles and Xie 2023): layers take their scales from a second input.
DIT = """
import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x):
        b, n, h = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, 16).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, h))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(64, elementwise_affine=False) for _ in range(2))
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        self.scales = nn.Sequential(nn.SiLU(), nn.Linear(64, 384))

    def forward(self, x, c):
        a, b, g, d, e, h = self.scales(c).unsqueeze(1).chunk(6, dim=2)
        x = x + g * self.attn(self.norm1(x) * (1 + b) + a)
        return x + h * self.mlp(self.norm2(x) * (1 + e) + d)


class DiT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.time = nn.Linear(16, 64), nn.Linear(8, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.out = nn.Linear(64, 16)

    def forward(self, latents, time):
        x, c = self.patches(latents), self.time(time)
        for block in self.blocks:
            x = block(x, c)
        return self.out(x)


def build_model():
    return DiT()


def make_batch(batch, seq):
    return {"latents": torch.randn(batch, seq, 16), "time": torch.randn(batch, 8)}


def loss(output, batch):
    return (output - batch["latents"]).square().mean()
"""

# Adapters of low rank (Hu et al. 2021) around the frozen matrices of another model.
LORA = """
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class Adapted(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + 2.0 * self.up(self.down(x))


def build_model():
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )).requires_grad_(False)
    for layer in model.model.layers:
        for parent, names in ((layer.self_attn, "qkvo"), (layer.mlp, ("gate", "up", "down"))):
            for name in names:
                linear = getattr(parent, f"{name}_proj")
                setattr(parent, f"{name}_proj", Adapted(linear))
    return model
"""
# Queries in one matrix, keys and values in another, cut as einops does it.
PAIR = """
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).reshape(b, n, 8, 8).transpose(1, 2)
        k, v = self.kv(x).reshape(b, n, 2, 4, 8).permute(2, 0, 3, 1, 4).repeat_interleave(2, dim=2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, n, -1))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attn, self.norm2 = nn.LayerNorm(64), Attention(), nn.LayerNorm(64)
        self.mlp = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.mlp(self.norm2(x))


def build_model():
    blocks = (Block() for _ in range(2))
    return nn.Sequential(nn.Embedding(256, 64), *blocks, nn.Linear(64, 256))
"""
# Two streams of tokens that attend to each other (Esser et al. 2024).
JOINT = """
import torch
import torch.nn.functional as F
from torch import nn


class Joint(nn.Module):
    def __init__(self):
        super().__init__()
        self.x, self.y = (
            nn.ModuleDict({name: nn.Linear(64, 64) for name in "qkvo"}) for _ in range(2)
        )

    def forward(self, x, y):
        b, n, h = x.shape
        q, k, v = (
            torch.cat([self.x[i](x), self.y[i](y)], 1).view(b, -1, 8, 8).transpose(1, 2)
            for i in "qkv"
        )
        z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, -1, h)
        return self.x["o"](z[:, :n]), self.y["o"](z[:, n:])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(64), nn.LayerNorm(64)
        self.attn = Joint()
        self.mlp, self.mlp2 = (
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
            for _ in range(2)
        )

    def forward(self, x, y):
        a, c = self.attn(self.norm(x), self.norm2(y))
        x, y = x + a, y + c
        return x + self.mlp(x), y + self.mlp2(y)


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.text, self.out = nn.Linear(16, 64), nn.Linear(8, 64), nn.Linear(64, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, latents, text):
        x, y = self.patches(latents), self.text(text)
        for block in self.blocks:
            x, y = block(x, y)
        return self.out(x) + y.mean((1, 2), keepdim=True)


def build_model():
    return Joined()


def make_batch(batch, seq):
    return {"latents": torch.randn(batch, seq, 16), "text": torch.randn(batch, seq, 8)}


def loss(output, batch):
    return (output - batch["latents"]).square().mean()
"""
FLEX = """
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention


def causal(score, b, h, q, k):
    return torch.where(q >= k, score, -float("inf"))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.o = nn.LayerNorm(64), nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x):
        b, s, h = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, s, 3, 4, 16).permute(2, 0, 3, 1, 4)
        y = flex_attention(q, k, v, score_mod=causal)
        return x + self.o(y.transpose(1, 2).reshape(b, s, h))


class Flex(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(256, 64), nn.Linear(64, 256)
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def build_model():
    return Flex()
"""
# Norms over all that ranks divide: of queries and keys, before the projection, within the MLP.
WIDE_NORMS = """
import torch
import torch.nn.functional as F
from torch import nn


class Written(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y - torch.mean(y, -1, keepdim=True)
        return self.scale * (y * torch.rsqrt((y * y).mean(dim=-1, keepdim=True) + 1e-5)).to(x.dtype)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.out = nn.Linear(64, 64), nn.Linear(64, 64)
        self.k, self.v = nn.Linear(64, 32), nn.Linear(64, 32)
        self.q_norm, self.k_norm = nn.RMSNorm(64), nn.RMSNorm(32, eps=1e-5)
        self.norm = nn.RMSNorm(64, elementwise_affine=False)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.q_norm(self.q(x)), self.k_norm(self.k(x)), self.v(x)
        q, k, v = (each.view(b, n, -1, 8).transpose(1, 2) for each in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(self.norm(y.transpose(1, 2).reshape(b, n, -1)))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(64, 128), Written(128), nn.Linear(128, 64)

    def forward(self, x):
        return self.down(self.norm(F.relu(self.up(x)).square()))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attn, self.norm2, self.mlp = nn.RMSNorm(64), Attention(), Written(64), MLP()

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.mlp(self.norm2(x))


def build_model():
    blocks = (Block() for _ in range(2))
    return nn.Sequential(nn.Embedding(256, 64), *blocks, nn.Linear(64, 256))
"""
# No list of layers: all of it is one.
LSTM = """
from torch import nn


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(256, 64), nn.Linear(64, 256)
        self.rnn = nn.LSTM(64, 64, 2, batch_first=True)

    def forward(self, ids):
        return self.head(self.rnn(self.embed(ids))[0])


def build_model():
    return Recurrent()
"""

CONFIGS: Final[Mapping[str, dict[str, Any]]] = MappingProxyType(
    yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
)
FILES: Final = MappingProxyType(
    {"nanogpt": NANOGPT, "dit": DIT, "lora": LORA, "pair": PAIR, "joint": JOINT, "flex": FLEX}
    | {"wide-norms": WIDE_NORMS, "lstm": LSTM}
    | TORCH_ATTENTION
)


def file_of(name: str) -> str:
    """The file that describes a family's model."""
    return f"{name}.json" if name in CONFIGS else f"{name}.py"


def write_family(name: str, folder: Path) -> Path:
    """The family's model, as a file that a plan can name."""
    path = folder / file_of(name)
    path.write_text(json.dumps(CONFIGS[name]) if name in CONFIGS else FILES[name])
    return path
