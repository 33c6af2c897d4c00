"""What is asked: sizes and choices that mean nothing do not construct."""

from dataclasses import replace

import pytest

from mist.errors import InputError
from mist.spaces import SearchSpace
from mist.spec import Precision
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
    ("knobs", "message"),
    [
        ({"tp": (2, 0)}, "tp 0 is not a positive number."),
        ({"pp": (-1,)}, "pp -1 is not a positive number."),
        ({"micro_batch": (0,)}, "micro_batch 0 is not a positive number."),
        ({"zero": (1, 4)}, "zero 4 is not a ZeRO level (0, 1, 2 or 3)."),
        ({"levels": ()}, "no memory level is left: allow eager, selective or full."),
        (
            {"offload": {"cache": (0.5,)}},
            "offload cache is none of weights, grads, optimizer, activations.",
        ),
        ({"offload": {"grads": (0.5, 2.0)}}, "offload grads 2 is not a ratio from 0 to 1."),
    ],
)
def test_a_space_holds_only_what_plans_can_have(knobs: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as refused:
        SearchSpace(**knobs)  # type: ignore[arg-type]
    assert str(refused.value) == message


def test_a_space_without_restrictions_allows_every_level() -> None:
    assert SearchSpace().zero == (0, 1, 2, 3)
