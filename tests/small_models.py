"""Model files small enough to be traced in seconds: what a user may hand to the command line."""

TINY = """
import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads = 4
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64, bias=False) for _ in range(4))

    def forward(self, x):
        b, s, _ = x.shape
        q, k, v = (m(x).view(b, s, -1, 16).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(b, s, -1))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(64), Attention()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.attn(self.norm(x)))))


class Tiny(nn.Module):
    max_seq_len = 512
    tp_plan = {
        "layers.*.attn.[qkv]": "colwise",
        "layers.*.attn.o": "rowwise",
        "layers.*.up": "colwise",
        "layers.*.down": "rowwise",
    }

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(1000, 64)
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.head = nn.Linear(64, 1000, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def build_model():
    return Tiny()


print("a line that the model's file prints")
"""

FLAT = """
from torch import nn


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(1000, 64), nn.Linear(64, 1000)

    def forward(self, ids):
        return self.head(self.embed(ids).tanh())


build_model = Flat
"""

BRANCHING = """
from torch import nn


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(1000, 64), nn.Linear(64, 1000)

    def forward(self, ids):
        x = self.embed(ids)
        if x.sum() > 0:
            x = -x
        return self.head(x)


build_model = Branching
"""

MODELS = {
    "tiny.py": TINY,
    "flat.py": FLAT,
    "branching.py": BRANCHING,
    "raising.py": "import torch\n\nraise RuntimeError('the disk is full')\n",
    "leaving.py": "import sys\n\nsys.exit(0)\n",
    "empty.py": "import torch\n",
    "number.py": "def build_model():\n    return 3\n",
    "failing.py": "def build_model():\n    return {}['layers']\n",
}
