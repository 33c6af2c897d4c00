"""FlexAttention is priced as a flash kernel with its mask's pattern."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from mist.model.graph import B, OpKind, S
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, trace_model
from mist.trace.operations.flex_attention import ROW, pattern_of
from mist.trace.operations.windows import Window

SETTING = TraceSetting(precision=Precision.BF16, attention=Attention.FLASH)
HEADS, HEAD = 4, 16
WIDTH = HEADS * HEAD

compiled = torch.compile(flex_attention, backend="eager")


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) & (q - k < 64)


def causal_scores(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.where(q >= k, score, -float("inf"))


def everything(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k >= 0


def strided(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) & ((q - k) % 8 == 0)


def prefix(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) | (k < ROW + 100)


def of_documents(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.empty(4, device="meta")[q] == torch.empty(4, device="meta")[k]


@pytest.mark.parametrize(
    ("sees", "is_causal", "window"),
    [
        (causal, True, None),
        (near, True, Window(63, 0)),
        (everything, False, None),
        (strided, True, None),
        (prefix, False, None),
        (of_documents, False, None),
    ],
)
def test_a_pattern_is_found_from_what_two_neighbours_see(
    sees: "flex._mask_mod_signature", is_causal: bool, window: Window | None
) -> None:
    assert pattern_of(sees) == (is_causal, window)


class Mix(nn.Module):
    """`how`: which of the ways to call it that code bases have."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.qkv, self.how, self.kernel = nn.Linear(WIDTH, 3 * WIDTH), how, compiled

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4)
        if self.how == "score":
            out = flex_attention(q, k, v, score_mod=causal_scores)
        elif self.how == "mask":
            out = compiled(q, k, v, block_mask=create_block_mask(causal, None, None, s, s))
        else:
            mask = flex.create_block_mask(near, b, HEADS, s, s, device="cuda").to("cuda")
            out = self.kernel(q, k, v, block_mask=mask, enable_gqa=True)
        return x + out.transpose(1, 2).reshape(b, s, WIDTH)


class Model(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(32, WIDTH), nn.Linear(WIDTH, 32)
        self.layers = nn.ModuleList(Mix(how) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["score", "mask", "window"])
def test_it_costs_what_a_flash_kernel_does(how: str) -> None:
    with torch.device("meta"):
        model = Model(how)
    graph = trace_model(model, SETTING)
    (forward,) = (
        op for op in graph.blocks[0].ops if op.kind is OpKind.ATTENTION and op.phase == "forward"
    )
    pairs = 64 * S - 64 * 63 // 2 if how == "window" else S**2
    assert (forward.flop - 4 * B * WIDTH * pairs).expand() == 0
    assert forward.causal == (how != "window")
    assert flex.flex_attention is flex_attention
    assert flex.create_block_mask is create_block_mask
