"""Sums over micro-batches of unequal numbers of labels are the loss of the whole batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import cross_entropy

from mist.errors import TraceError
from mist.exec.build.loss import summed_loss
from mist.trace.models.loader import LoadedModel

B, S, V = 6, 5, 11
Batch = dict[str, torch.Tensor]


def labels() -> torch.Tensor:
    """Samples 0 and 1 have none, and sample 2 has only its first one."""
    torch.manual_seed(1)
    ids = torch.randint(1, V, (B, S))
    learned = torch.rand(B, S) < torch.rand(B, 1)
    learned[:3] = False
    learned[2, 0] = learned[4, 3] = True
    return ids.where(learned, -100)


class Table(nn.Module):
    """Logits of each place: as little of a model as a loss needs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.rows = nn.Parameter(torch.randn(V, V, dtype=torch.float64))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.rows[input_ids]


def of(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return logits.flatten(0, 1), batch["labels"].flatten()


WEIGHTS = torch.linspace(0.1, 2.0, V, dtype=torch.float64)


def shifted(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def with_other_mask(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    given = batch["labels"].where(batch["labels"] >= 0, 0)
    return F.cross_entropy(logits.flatten(0, 1), given.flatten(), ignore_index=0)


def by_hand(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    learned = batch["labels"] != -100
    places = batch["labels"].where(learned, 0).unsqueeze(-1)
    losses = -logits.log_softmax(-1).gather(-1, places).squeeze(-1)
    return (losses * learned).sum() / learned.sum()


MEANS: dict[str, Callable[[torch.Tensor, Batch], torch.Tensor]] = {
    "mean": lambda x, batch: F.cross_entropy(*of(x, batch)),
    "module": lambda x, batch: nn.CrossEntropyLoss()(*of(x, batch)),
    "by position": lambda x, batch: F.cross_entropy(*of(x, batch), None, None, -100),
    "not flat": lambda x, batch: F.cross_entropy(x.transpose(1, 2), batch["labels"]),
    "class weights": lambda x, batch: F.cross_entropy(*of(x, batch), weight=WEIGHTS),
    "smooth": lambda x, batch: F.cross_entropy(*of(x, batch), WEIGHTS, label_smoothing=0.1),
    "log": lambda x, batch: F.nll_loss(x.log_softmax(-1).flatten(0, 1), batch["labels"].flatten()),
    "shifted": shifted,
    "imported": lambda x, batch: cross_entropy(x[:, 1:].mT, batch["labels"][:, :-1]),
    "other mask": with_other_mask,
    "by hand": by_hand,
    "squares": lambda x, batch: x.square().mean(dim=(1, 2)).mean(),
}


def batch_of() -> Batch:
    torch.manual_seed(3)
    return {"input_ids": torch.randint(0, V, (B, S)), "labels": labels()}


def in_parts(loaded: LoadedModel, batch: Batch) -> torch.Tensor:
    """The loss of a step of one-sample micro-batches."""
    rows = [{name: leaf[i : i + 1] for name, leaf in batch.items()} for i in range(B)]
    totals, numbers = zip(*(summed_loss(loaded, row) for row in rows), strict=True)
    for total in totals:
        assert total.isfinite()
    result: torch.Tensor = torch.stack(totals).sum() / torch.stack(numbers).sum()
    return result


def gradients(loss: torch.Tensor, model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", MEANS)
def test_means_of_micro_batches_add_up(name: str) -> None:
    model, batch = Table(), batch_of()
    if name == "squares":
        del batch["labels"]
        model.forward = lambda input_ids: model.rows[input_ids]  # type: ignore[method-assign]
    loaded = LoadedModel(module=model, name="table", make_batch=None, loss=MEANS[name])
    whole = loaded.run(batch)
    parts = in_parts(loaded, batch)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(
        gradients(parts, model), gradients(whole, model), rtol=1e-12, atol=1e-14
    )


def test_a_pair_is_taken_as_it_is() -> None:
    def pair(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, int]:
        return logits.sum(), int((batch["labels"] != -100).sum())

    batch = batch_of()
    loaded = LoadedModel(module=Table(), name="table", make_batch=None, loss=pair)
    number = int((batch["labels"] != -100).sum())
    assert loaded.run(batch).item() == pytest.approx(summed_loss(loaded, batch)[0].item() / number)
    assert summed_loss(loaded, batch)[1] == number


@pytest.mark.parametrize("returned", [None, 3.0, (1, 2), (torch.zeros(()), 1, 2)])
def test_other_returns_are_refused(returned: object) -> None:
    loaded = LoadedModel(
        module=Table(), name="table", make_batch=None, loss=lambda output, batch: returned
    )
    kind = {"NoneType": "None", "float": "a float", "tuple": "a tuple"}[type(returned).__name__]
    with pytest.raises(TraceError) as error:
        loaded.run(batch_of())
    assert str(error.value) == (
        f"loss(output, batch) returned {kind}. Return a mean (a scalar tensor), or the pair (sum "
        "over tokens, number of tokens)."
    )


TINY: dict[str, Any] = {"vocab_size": V, "pad_token_id": 0, "attn_implementation": "eager"}
HUGGING_FACE: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "GPT2LMHeadModel": {"n_embd": 8, "n_layer": 1, "n_head": 2},
    "BertForMaskedLM": {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "T5ForConditionalGeneration": {
        "d_model": 8,
        "d_ff": 8,
        "d_kv": 4,
        "num_layers": 1,
        "num_heads": 2,
        "decoder_start_token_id": 0,
    },
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_models_count_the_labels_that_they_learn(name: str) -> None:
    """Causal models shift their labels, masked ones and encoder-decoders do not."""
    import transformers

    kind = getattr(transformers, name)
    torch.manual_seed(4)
    model = kind(kind.config_class(**TINY, **HUGGING_FACE[name])).eval()
    loaded = LoadedModel(module=model, name=name, make_batch=None, loss=None)
    batch = batch_of()
    whole = model(**batch).loss
    parts = in_parts(loaded, batch)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-6)  # fp32
    wrong = torch.stack([loaded.run({k: v[i:] for k, v in batch.items()}) for i in (3, 4, 5)])
    assert abs(wrong.mean().item() - whole.item()) > 1e-4


def test_labels_of_the_batch_are_what_the_default_loss_learns() -> None:
    batch = batch_of()
    loaded = LoadedModel(module=Table(), name="table", make_batch=None, loss=None)
    known = F.cross_entropy(loaded.module(**batch).float().flatten(0, 1), batch["labels"].flatten())
    assert in_parts(loaded, batch).item() == pytest.approx(known.item(), rel=1e-6)
