"""A batch may hold what only the loss reads, but nothing that nobody reads."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mist.errors import TraceError
from mist.trace.models.loader import LoadedModel
from mist.trace.models.watched_batch import WatchedBatch


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.out(x) * scale


def make_batch(batch: int, seq: int) -> dict[str, torch.Tensor]:
    return {"x": torch.ones(batch, 4), "y": torch.zeros(batch, dtype=torch.int64)}


def loss(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(output, batch["y"])


MODEL = LoadedModel(module=Classifier(), name="classifier", make_batch=make_batch, loss=loss)


def test_what_forward_does_not_take_is_for_the_loss() -> None:
    batch = make_batch(2, 1)
    assert torch.equal(MODEL.run(batch), loss(MODEL.module(batch["x"]), batch))


def test_only_what_forward_takes_is_mapped() -> None:
    mapped = MODEL.map_inputs(lambda leaf: None, make_batch(2, 1) | {"scale": 2.0})
    assert isinstance(mapped, dict)
    assert mapped["x"] is mapped["scale"] is None
    assert mapped["y"] is not None


def test_an_entry_that_nobody_reads_is_refused() -> None:
    with pytest.raises(TraceError) as refused:
        MODEL.run(make_batch(2, 1) | {"scales": torch.ones(1)})
    assert str(refused.value) == (
        "make_batch gives 'scales', which neither forward nor the loss of classifier reads. The "
        "arguments of forward are x, scale."
    )


@pytest.mark.parametrize(
    ("read", "unread"),
    [
        (lambda batch: batch["x"], {"y"}),
        (lambda batch: batch.get("y"), {"x"}),
        (lambda batch: batch.get("z", 1), {"x", "y"}),
        (dict, set()),
        (lambda batch: {**batch}, set()),
        (lambda batch: list(batch.values()), set()),
        (lambda batch: list(batch.items()), set()),
    ],
)
def test_what_was_read(read: object, unread: set[str]) -> None:
    batch = WatchedBatch({"x": 1, "y": 2})
    assert callable(read)
    read(batch)
    assert batch.unread == unread
