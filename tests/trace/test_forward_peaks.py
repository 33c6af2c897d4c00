"""Layers that hold more in their forward pass than in their backward pass."""

import pytest
import torch
from sympy import Expr, Integer
from torch import nn

from mist.model.graph import GATHERS, B, Block, Q, S, T
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, trace_model
from mist.trace.recording.forward_peaks import worst_forward
from tests.tokens import tokens
from tests.trace.real import Watch
from tests.trace.test_repeated_blocks import WIDTH, Model


class Layer(nn.Module):
    """Weights by distance, which have no gradient, from tables for each pair of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.matrix(x))
        places = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
        near = torch.exp(-(places[:, None] - places).abs())
        return x + y * near.mean(1)[:, None]


def real_forward_bytes(b: int, s: int) -> int:
    """The most that a real layer holds in its forward pass, input included, of no parameter."""
    layer, x = Layer(), torch.zeros(b, s, WIDTH, requires_grad=True)
    known = {t.untyped_storage()._cdata for t in (x, *layer.parameters())}
    with Watch([], known) as watch:
        layer(x)
    return x.untyped_storage().nbytes() + watch.peak(set())


@pytest.fixture(scope="module")
def block() -> Block:
    setting = TraceSetting(precision=Precision.FP32, attention=Attention.FLASH, policy="cpu")
    return trace_model(Model([Layer() for _ in range(3)]), setting).blocks[0]


@pytest.mark.parametrize(("b", "s"), [(2, 64), (3, 256)])
def test_the_forward_pass_holds_what_a_real_one_does(block: Block, b: int, s: int) -> None:
    at = {B: b, S: s, T: 1} | tokens(1, b)
    saved = sum(tensor.bytes for tensor in block.saved).subs(at)
    forward = max(size.subs(at) for size in block.forward_bytes)
    assert saved + forward == real_forward_bytes(b, s)
    assert forward > max(size.subs(at) for size in block.transient_bytes)


TOKENS = B * S


@pytest.mark.parametrize(
    ("forward", "backward", "is_worst"),
    [
        (TOKENS, [2 * TOKENS], False),
        (TOKENS * S, [2 * TOKENS], True),  # at long sequences
        (S, [TOKENS], False),  # there is a sample at least
        (3 * TOKENS, [8 * TOKENS / T], True),  # on 3 ranks
        # One instant covers it on up to 3 ranks, the other one from 3 on.
        (3 * TOKENS, [9 * TOKENS / T, 4 * TOKENS - 3 * TOKENS / T], False),
        # What is gathered under sequence parallelism only.
        (TOKENS, [TOKENS / Q + GATHERS * TOKENS], False),
        (TOKENS, [TOKENS / Q], True),
        (Integer(-1), [], False),  # less than it keeps
    ],
)
def test_an_instant_is_covered_at_each_number_of_ranks(
    forward: Expr, backward: list[Expr], is_worst: bool
) -> None:
    assert worst_forward([forward], backward) == ((forward,) if is_worst else ())
