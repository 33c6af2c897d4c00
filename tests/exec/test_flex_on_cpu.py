"""FlexAttention trains on a CPU: its values and gradients are those of torch's other attention."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from mist.exec.build.flex_on_cpu import flex_on

CPU = torch.device("cpu")
MOST = 1e-12  # rounding of float64 over 40 tokens


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def causal_scores(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.where(q >= k, score, -float("inf"))


class ByScores(nn.Module):
    def forward(self, *given: Tensor) -> object:
        return flex_attention(*given, score_mod=causal_scores, enable_gqa=True)


class ByBlocks(nn.Module):
    def forward(self, *given: Tensor) -> object:
        mask = create_block_mask(causal, None, None, 40, 40, device="cpu")
        out, _ = flex_attention(*given, block_mask=mask, enable_gqa=True, return_lse=True)
        return out


@pytest.mark.parametrize("kind", [ByScores, ByBlocks])
def test_flex_attention_has_gradients_on_a_cpu(kind: Callable[[], nn.Module]) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(heads: int) -> Tensor:
        shape = (2, heads, 40, 16)
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    model, weights = kind(), drawn(4).detach()
    given = drawn(4), drawn(2), drawn(2)
    with flex_on(CPU, model.modules()):
        result = model(*given)
        found = torch.autograd.grad(result, given, weights)
    known_result = F.scaled_dot_product_attention(*given, is_causal=True, enable_gqa=True)
    known = torch.autograd.grad(known_result, given, weights)
    for one, other in zip((result, *found), (known_result, *known), strict=True):
        assert (one - other).abs().max() <= MOST
