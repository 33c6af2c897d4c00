"""What is asked: sizes and choices that mean nothing do not construct."""

from dataclasses import replace

import pytest

from mist.errors import InputError
from mist.plans.workload import Precision
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
