"""What is asked: sizes and choices that mean nothing do not construct."""

from dataclasses import replace

import pytest

from mist.errors import InputError
from mist.plans.workload import MOST_SAMPLES, Precision, batches_near
from tests.toys import toy_workload


@pytest.mark.parametrize(
    ("precision", "num_bytes"), [(Precision.BF16, 2), (Precision.FP16, 2), (Precision.FP32, 4)]
)
def test_bytes_of_a_precision(precision: Precision, num_bytes: int) -> None:
    assert precision.num_bytes == num_bytes


def test_tokens_per_step() -> None:
    assert toy_workload(seq_len=2048, global_batch=64).tokens_per_step == 131_072


@pytest.mark.parametrize(
    ("name", "option"), [("seq_len", "--seq"), ("global_batch", "--global-batch")]
)
@pytest.mark.parametrize("size", [0, -8])
def test_a_workload_has_positive_sizes(name: str, option: str, size: int) -> None:
    with pytest.raises(InputError) as refused:
        replace(toy_workload(), **{name: size})
    message = f"{option} {size} is not a positive number of samples or tokens."
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("batch", "step", "near"),
    [
        (256, 24, (240, 264)),
        (7, 8, (8,)),
        (MOST_SAMPLES, 3, (MOST_SAMPLES - 1,)),
        (8, 2 * MOST_SAMPLES, ()),
    ],
)
def test_batches_that_are_advised_can_be_planned(
    batch: int, step: int, near: tuple[int, ...]
) -> None:
    assert batches_near(batch, step) == near
    for each in near:
        assert replace(toy_workload(), global_batch=each).global_batch % step == 0
