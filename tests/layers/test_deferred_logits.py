"""Heads that compute no logits until a loss asks: against the plain model, in float64 and bytes."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mist.errors import InputError
from mist.layers import defer_logits
from mist.layers.deferred_logits import DeferredLogits
from mist.model.graph import B, Q, S, T
from mist.plans.workload import Attention, HeadMode, Precision
from mist.trace.model_trace import trace_with_head
from mist.trace.models.loader import LoadedModel
from mist.trace.models.source import TraceSetting
from tests.trace.real import Watch

OTHERS = [mode for mode in HeadMode if mode is not HeadMode.NONE]
WORDS, WIDTH = 64, 16
Loss = Callable[[Tensor, Tensor], Tensor]


class Small(nn.Module):
    """Two layers and a head; the loss is as the test writes it."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        layers = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, WORDS, bias=bias)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits


def rows(logits: Tensor, ids: Tensor) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide).flatten(0, -2), ids.flatten())


def shifted(logits: Tensor, ids: Tensor) -> Tensor:
    ahead = logits[..., :-1, :].contiguous()
    return nn.CrossEntropyLoss()(ahead.view(-1, ahead.size(-1)), ids[..., 1:].reshape(-1))


def masked(logits: Tensor, ids: Tensor) -> Tensor:
    labels = ids.masked_fill(ids % 3 == 0, 7)
    wide = logits.to(torch.float64).reshape(-1, logits.shape[-1])
    return F.cross_entropy(wide, labels.flatten(), ignore_index=7, reduction="sum") / 10


def smoothed(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten(), label_smoothing=0.1)


def columns(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), ids)


def scaled(logits: Tensor, ids: Tensor) -> Tensor:
    return rows(logits * 0.5, ids)


def built(*, bias: bool = False) -> Small:
    torch.manual_seed(0)
    return Small(bias=bias).double()


def gradients(model: Small, loss: Loss) -> list[Tensor]:
    ids = torch.arange(3 * 13).reshape(3, 13) % WORDS
    value = loss(model(ids), ids)
    value.backward()
    return [value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("mode", OTHERS)
@pytest.mark.parametrize("loss", [rows, shifted, masked])
def test_a_loss_needs_no_logits(loss: Loss, mode: HeadMode) -> None:
    plain, model = gradients(built(), loss), built()
    head = defer_logits(model, model.layers, mode)
    for ours, theirs in zip(gradients(model, loss), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert head is not None
    head.refuse_unused("small")
    assert head.num_losses == 1


@pytest.mark.parametrize("loss", [smoothed, columns, scaled])
def test_what_else_is_asked_gets_the_product(loss: Loss) -> None:
    plain, model = gradients(built(), loss), built()
    head = defer_logits(model, model.layers, HeadMode.CHECKPOINTED)
    for ours, theirs in zip(gradients(model, loss), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert head is not None
    with pytest.raises(InputError) as refused:
        head.refuse_unused("small")
    assert str(refused.value) == (
        "head checkpointed: the loss of small is no plain cross-entropy of what its last matrix "
        "gives. Use head none."
    )


def test_a_stand_in_looks_like_the_logits() -> None:
    model, ids = built(), torch.arange(6).reshape(2, 3)
    plain = model(ids)
    defer_logits(model, model.layers, HeadMode.IN_FORWARD)
    logits = model(ids)
    assert isinstance(logits, DeferredLogits)
    assert (logits.shape, logits.dtype, logits.device) == (plain.shape, plain.dtype, plain.device)
    assert torch.equal(logits.argmax(-1), plain.argmax(-1))
    assert torch.equal(logits[:, 0, 5], plain[:, 0, 5])
    assert torch.equal(logits.view(-1), plain.view(-1))
    assert torch.equal(logits.flatten(), plain.flatten())
    assert torch.equal(logits.view(2, 6, -1), plain.view(2, 6, -1))
    assert torch.equal(ids.to(logits).double(), ids.double())


def test_a_head_that_is_not_known_is_refused() -> None:
    model = built(bias=True)
    with pytest.raises(InputError) as refused:
        defer_logits(model, model.layers, HeadMode.IN_FORWARD)
    assert str(refused.value) == (
        "head in-forward: Small has no linear layer without bias behind its layers. Use head none."
    )
    assert defer_logits(model, model.layers, HeadMode.NONE) is None


@pytest.mark.slow  # a trace of either takes seconds
@pytest.mark.parametrize("mode", [HeadMode.IN_FORWARD, HeadMode.CHECKPOINTED])
def test_the_trace_of_a_head_is_what_real_tensors_take(mode: HeadMode) -> None:
    """Kept to the backward pass, and the most alive in either pass, to the byte."""
    loaded = LoadedModel(
        module=Small().to(torch.bfloat16), name="small", make_batch=None, loss=None
    )
    setting = TraceSetting(
        precision=Precision.BF16, attention=Attention.FLASH, policy="cpu", head=mode
    )
    head = trace_with_head(loaded, mode, setting, lambda message: None).graph.head
    for b, s in ((2, 33), (3, 64)):
        kept, peak = real_bytes(mode, b, s)
        sizes = {B: b, S: s, Q: 1, T: 1}
        traced = sum(tensor.bytes.subs(sizes) for tensor in head.saved)
        extra = max(size.subs(sizes) for size in head.transient_with_grads_bytes)
        assert (traced, traced + extra) == (kept, peak), (b, s)


def real_bytes(mode: HeadMode, b: int, s: int) -> tuple[int, int]:
    """The same of a head alone, which is given what the last layer gave."""
    model = Small().to(torch.bfloat16)
    ids = torch.randint(WORDS, (b, s))
    hidden = torch.randn(b, s, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    given = hidden.numel() * hidden.element_size()
    known = {each.untyped_storage()._cdata for each in (*model.parameters(), ids, hidden)}
    defer_logits(model, model.layers, mode)
    forward = Watch([], known)
    with forward:
        loss = rows(model.head(hidden), ids)
    # The loss itself belongs to whoever asked for it.
    known.add(loss.untyped_storage()._cdata)
    rest = [
        (ref, size) for ref, size, key in forward.refs if not ref.expired() and key not in known
    ]
    backward = Watch(rest, known)
    with backward:
        loss.backward()
    kept = sum(size for _, size in rest) + given * (mode is HeadMode.CHECKPOINTED)
    return kept, max(forward.peak(set()), backward.peak(set())) + given
