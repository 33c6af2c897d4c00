"""Attention as people write it by hand, in a model that tensor parallelism halves.

Numbers of heads and widths are globals: nothing of a module says what a rank has less of.
"""

import json
from pathlib import Path

from tests.exec.layouts import NUM_LAYERS, PLAIN, PLAIN_SIZES, VOCAB, S, Variant

ATTENTION = """
import math

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
WIDTH = KV_HEADS * HEAD_DIM


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n_embd = DIM
        {made}
        self.c_proj = nn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        {forward}
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


def build_model() -> nn.Module:
    return MyTransformer()
"""
FUSED = "self.c_attn = nn.Linear(DIM, 3 * DIM)"
IN_ONE = "q, k, v = self.c_attn(x)"
GROUPED = "self.c_attn = nn.Linear(DIM, DIM + 2 * WIDTH)"
APART = "self.q, self.k, self.v = nn.Linear(DIM, DIM), nn.Linear(DIM, WIDTH), nn.Linear(DIM, WIDTH)"
SDPA = "y = F.scaled_dot_product_attention(q, k, v, is_causal=True)"
HEADS_OF = "q, k, v = (a.view(B, T, HEADS, C // HEADS).transpose(1, 2) for a in (q, k, v))"
REPEATED = (
    "q = q.view(B, T, HEADS, -1).transpose(1, 2)",
    "k, v = (a.reshape(B, T, KV_HEADS, HEAD_DIM).transpose(1, 2) for a in (k, v))",
    "k, v = (a[:, :, None].expand(B, KV_HEADS, HEADS // KV_HEADS, T, HEAD_DIM)"
    ".reshape(B, HEADS, T, HEAD_DIM) for a in (k, v))",
)
SCORES = "scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM)"
MASKED = "y = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -1e9).softmax(-1) @ v"
COPIED = "copied"  # a copy of several matrices is cut, of which nobody can tell whose it is
# Name -> what makes the matrices, and the lines up to the result [batch, heads, tokens, width].
STYLES = {
    "split": (FUSED, [f"{IN_ONE}.split(self.n_embd, dim=2)", HEADS_OF, SDPA]),
    "chunk": (FUSED, [f"{IN_ONE}.chunk(3, dim=-1)", HEADS_OF, SDPA]),
    "slices": (
        FUSED,
        ["a = self.c_attn(x)", "q, k, v = a[..., :C], a[..., C:2 * C], a[..., 2 * C:]",
         HEADS_OF, SDPA],
    ),
    "unlike": (GROUPED, [f"{IN_ONE}.split([DIM, WIDTH, WIDTH], -1)", *REPEATED, SDPA]),
    "nested": (
        GROUPED,
        ["a = self.c_attn(x)", "q, kv = a[..., :DIM], a[..., DIM:]", "k, v = kv.chunk(2, dim=-1)",
         *REPEATED, SDPA],
    ),
    COPIED: (
        GROUPED,
        ["q, kv = self.c_attn(x).split(DIM, dim=-1)", "k, v = kv.contiguous().chunk(2, dim=-1)",
         *REPEATED, SDPA],
    ),
    "three_first": (
        FUSED,
        ["q, k, v = self.c_attn(x).view(B, T, 3, HEADS, -1).permute(2, 0, 3, 1, 4)", SDPA],
    ),
    "heads_first": (
        FUSED,
        ["a = self.c_attn(x).view(B, T, HEADS, 3 * HEAD_DIM).transpose(1, 2)",
         "q, k, v = a.split(HEAD_DIM, -1)", SDPA],
    ),
    "grouped": (APART, ["q, k, v = (m(x) for m in (self.q, self.k, self.v))", *REPEATED, SDPA]),
    "scores": (
        FUSED,
        [f"{IN_ONE}.chunk(3, dim=-1)", HEADS_OF,
         "q, k, v = (a.reshape(B * HEADS, T, HEAD_DIM) for a in (q, k, v))",
         "scores = torch.bmm(q, k.transpose(1, 2)).view(B, HEADS, T, T) / 4.0",
         "v = v.view(B, HEADS, T, HEAD_DIM)", MASKED],
    ),
    "slopes": (
        FUSED + "\n        self.table = nn.Parameter(torch.zeros(HEADS, 1, 1))",
        [f"{IN_ONE}.split(DIM, dim=-1)", HEADS_OF, SCORES,
         "slopes = torch.arange(1.0, HEADS + 1).view(HEADS, 1, 1)",
         "scores = scores + (slopes * torch.arange(T) / T).to(x.dtype)",
         "scores = scores + self.table * torch.arange(T)", MASKED],
    ),
}  # fmt: skip

# A decoder with an encoder, which adds a table of its own to the logits.
BART = {
    "model_type": "bart",
    "vocab_size": VOCAB,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 128,
    "dropout": 0.0,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "architectures": ["BartForConditionalGeneration"],
}
# Biases by head, which only the first layer of each list makes.
T5 = {
    "model_type": "t5",
    "vocab_size": VOCAB,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "architectures": ["T5ForConditionalGeneration"],
}
CONFIGS = {"bart": BART, "t5": T5}


def write_sized_models(folder: Path) -> None:
    """The tiny models, as files that a plan can name."""
    lines = PLAIN.read_text().splitlines()
    sizes = f"{PLAIN_SIZES}64, {NUM_LAYERS}, 4, {VOCAB}, 128"
    text = "\n".join(sizes if line.startswith(PLAIN_SIZES) else line for line in lines)
    for name, (made, forward) in STYLES.items():
        body = ATTENTION.format(made=made, forward="\n        ".join(forward))
        (folder / f"{name}.py").write_text(f"{text}\n{body}")
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))


SIZED = tuple(
    Variant(name=f"{name}{' sp' * sp}", model=f"{name}.py", stages=(S(tp=2, sp=sp),), micro=8)
    for name in STYLES
    if name != COPIED
    for sp in (False, True)
)
# BART has no module that is given the activation for its attention alone: sp is refused.
WITH_ENCODER = tuple(
    Variant(name=name, model=f"{name}.json", stages=(S(tp=2),), micro=8) for name in CONFIGS
)
