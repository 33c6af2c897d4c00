"""Tiny models with torch's own attention module, as people write them: files that stand alone."""

from types import MappingProxyType
from typing import Final

# Post-norm layers with a causal mask of floats.
ENCODER = """
from torch import nn


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(256, 64), nn.Linear(64, 256)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        return self.head(self.layers(self.embed(ids), mask=mask, is_causal=True))


def build_model():
    return Encoder()
"""
# Tokens come before samples, as torch has it where batch_first is not said.
TOKENS_FIRST = """
from torch import nn


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(256, 64), nn.Linear(64, 256)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids):
        return self.head(self.layers(self.embed(ids).transpose(0, 1)).transpose(0, 1))


def build_model():
    return Encoder()
"""
# Queries of one sequence, keys and values of another.
TRANSFORMER = """
from torch import nn


class Translator(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(256, 64), nn.Linear(64, 256)
        self.transformer = nn.Transformer(64, 4, 2, 2, 128, dropout=0.0, batch_first=True)

    def forward(self, ids):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        x = self.embed(ids)
        return self.head(self.transformer(x, x, tgt_mask=mask, tgt_is_causal=True))


def build_model():
    return Translator()
"""
# Weights of attention that are asked for and dropped, a mask of padding, and matrices of unlike
# widths, which torch keeps apart.
ASKED = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.norm2, self.norm3 = (nn.LayerNorm(64) for _ in range(3))
        self.attn = nn.MultiheadAttention(64, 4, batch_first=True)
        self.cross = nn.MultiheadAttention(64, 4, kdim=32, vdim=32, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))

    def forward(self, x, memory, padding):
        y = self.norm(x)
        z, _ = self.attn(y, y, y, key_padding_mask=padding)
        x = x + z
        x = x + self.cross(self.norm2(x), memory, memory, need_weights=False)[0]
        return x + self.mlp(self.norm3(x))


class Asked(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.memory = nn.Embedding(256, 64), nn.Embedding(256, 32)
        self.head = nn.Linear(64, 256)
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, ids):
        x, memory = self.embed(ids), self.memory(ids)
        padding = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
        for layer in self.layers:
            x = layer(x, memory, padding)
        return self.head(x)


def build_model():
    return Asked()
"""
# Convolutions in front of it (Carion et al. 2020): layers that pass on no tokens.
IMAGES = """
import torch
from torch import nn


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(64, 64, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x).relu()


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 64, 4, 4), nn.Linear(64, 10)
        self.convolutions = nn.ModuleList(Convolution() for _ in range(2))
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, images):
        x = self.stem(images)
        for convolution in self.convolutions:
            x = convolution(x)
        return self.head(self.layers(x.flatten(2).transpose(1, 2)).mean(1))


def build_model():
    return Images()


def make_batch(batch, seq):
    return {"images": torch.randn(batch, 3, 16, 16)}


def loss(output, batch):
    return output.float().square().mean()
"""

TORCH_ATTENTION: Final = MappingProxyType(
    {
        "torch-encoder": ENCODER,
        "torch-tokens-first": TOKENS_FIRST,
        "torch-transformer": TRANSFORMER,
        "torch-asked": ASKED,
        "torch-images": IMAGES,
    }
)
