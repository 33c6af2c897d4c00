"""A batch that is not of the plan's shape is refused, with the same words by every rank."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mist.errors import InputError
from mist.exec.build.batch_shape import BatchShape, planned_shape
from mist.exec.build.empty_weights import load
from mist.plans.workload import Attention
from mist.trace.models.loader import LoadedModel
from tests.exec.forking import RunRanks
from tests.exec.layouts import BATCH, SEQ_LEN, S, Variant, plan_of, write_models
from tests.exec.masked_layouts import write_masked_models
from tests.exec.test_apply import LIMIT_S, plan_file, start

IDS = torch.zeros(BATCH, SEQ_LEN, dtype=torch.int64)
LAST = " rank all samples of a step in tensors whose first dimension counts them, or plan "
LENGTHS = """

def make_batch(batch: int, seq: int) -> dict[str, torch.Tensor]:
    planned = isinstance(torch.empty(1), torch._subclasses.fake_tensor.FakeTensor)
    ids = torch.zeros(batch, seq if planned else seq - 1, dtype=torch.int64)
    return {"input_ids": ids, "labels": ids}
"""


def shape_of(name: str, folder: Path) -> BatchShape:
    write_masked_models(folder)
    plan = plan_of(Variant(name="any", stages=(S(),), model=name), folder)
    return planned_shape(load(plan.model.source, Attention.FLASH), plan.workload)


def test_the_planned_shape_is_that_of_the_model_or_of_its_file(tmp_path: Path) -> None:
    tokens = (BATCH, SEQ_LEN)
    assert shape_of("llama.json", tmp_path).leaves == {"input_ids": tokens, "labels": tokens}
    assert shape_of("pair.py", tmp_path).leaves == {"input_ids": tokens, "labels": tokens}
    plain = shape_of("plain.py", tmp_path)
    assert (plain.leaves, plain.is_open) == ({"tensor": tokens}, True)


def test_what_fits(tmp_path: Path) -> None:
    llama, plain = shape_of("llama.json", tmp_path), shape_of("plain.py", tmp_path)
    labelled = {"input_ids": IDS, "labels": IDS}
    llama.check(labelled)
    llama.check({**labelled, "attention_mask": IDS, "position_ids": IDS})
    llama.check({**labelled, "attention_mask": torch.ones(BATCH, 1, SEQ_LEN, SEQ_LEN)})
    plain.check(IDS)
    plain.check((IDS, IDS))
    plain.check({"tokens": IDS, "weights": torch.ones(BATCH)})


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"input_ids": IDS[:, 1:], "labels": IDS[:, 1:]}, "input_ids [16, 31], labels [16, 31]"),
        ({"input_ids": IDS[1:], "labels": IDS[1:]}, "input_ids [15, 32], labels [15, 32]"),
        ({"input_ids": IDS}, "input_ids [16, 32]"),
        ({"labels": IDS}, "labels [16, 32]"),
        (
            {"input_ids": IDS, "labels": IDS, "attention_mask": IDS[:, :8]},
            "input_ids [16, 32], labels [16, 32], attention_mask [16, 8]",
        ),
        (
            {"input_ids": IDS, "labels": IDS, "position_ids": IDS[:1]},
            "input_ids [16, 32], labels [16, 32], position_ids [1, 32]",
        ),
        (
            {"input_ids": IDS, "labels": IDS, "attention_mask": None},
            "input_ids [16, 32], labels [16, 32], attention_mask NoneType",
        ),
        (
            {"input_ids": IDS, "labels": IDS.tolist()[0][:1]},
            "input_ids [16, 32], ['labels'][0] int",
        ),
        (IDS, "tensor [16, 32]"),
        ({}, "nothing"),
    ],
)
def test_what_does_not_fit(batch: object, found: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        shape_of("llama.json", tmp_path).check(batch)
    assert str(error.value) == (
        "the batch does not fit the plan: a step takes 16 samples of 32 tokens, as input_ids "
        f"[16, 32], labels [16, 32]; found {found}. Give every{LAST}again with --seq and "
        "--global-batch of the batch."
    )


def test_labels_of_classes_have_the_shape_that_the_file_gives() -> None:
    loaded = LoadedModel(
        module=nn.Linear(2, 2),
        name="classes",
        make_batch=lambda b, s: {"x": torch.empty(b, s, 3), "labels": torch.empty(b, 5)},
        loss=None,
    )
    shape = planned_shape(loaded, plan_of(Variant(name="any", stages=(S(),)), Path()).workload)
    shape.check({"x": torch.empty(BATCH, SEQ_LEN, 3), "labels": torch.empty(BATCH, 5)})
    with pytest.raises(InputError):
        shape.check({"x": torch.empty(BATCH, SEQ_LEN, 2), "labels": torch.empty(BATCH, 5)})


@pytest.mark.slow
def test_every_rank_refuses_before_its_first_collective(tmp_path: Path, forked: RunRanks) -> None:
    """A right step goes on after each refusal: no rank was left in a collective."""
    write_models(tmp_path)
    out = tmp_path / "refused.json"
    forked("tests.exec.refusing", tmp_path, out, num_ranks=2)
    found = json.loads(out.read_text())
    assert sorted(found) == ["dp2", "pp2", "tp2"]
    for texts in found.values():
        assert len(texts) == 2 * 3
        assert len(set(texts)) == 3
        assert all("the batch does not fit the plan" in text for text in texts)


@pytest.mark.slow
def test_apply_shows_one_message_and_exits_with_2(tmp_path: Path) -> None:
    write_masked_models(tmp_path)
    (tmp_path / "lengths.py").write_text((tmp_path / "mean.py").read_text() + LENGTHS)
    stages = (S(layers=(2,)), S(layers=(2,)))
    variant = Variant(name="lengths", model="lengths.py", stages=stages, micro=4)
    run = start(plan_file(variant, tmp_path), folder=tmp_path)
    _, errors = run.communicate(timeout=LIMIT_S)
    assert run.returncode == 2, errors
    assert errors.count("the batch does not fit the plan") == 1
    assert "found input_ids [16, 31], labels [16, 31]" in errors
    assert "Traceback" not in errors
