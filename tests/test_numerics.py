"""Formats of numbers by word: what computes in them, and what is kept in fp32."""

import pytest

from mist.plans.numerics import NUMERICS
from mist.plans.workload import Precision


@pytest.mark.parametrize(
    ("word", "compute_bytes", "product_bytes"),
    [
        *(("bf16", 2, 2), ("fp16", 2, 2), ("fp32", 4, 4), ("fp8", 2, 1)),  # 16, 32 and 8 bits
        *(("tf32", 4, 4), ("nvfp4", 2, 1)),  # of tensor cores: bytes of fp32, and of fp8's law
    ],
)
def test_bytes_of_a_word(word: str, compute_bytes: int, product_bytes: int) -> None:
    numerics = NUMERICS[word]
    assert (numerics.compute.num_bytes, numerics.product_bytes) == (compute_bytes, product_bytes)
    # As mixed-precision training keeps them (Micikevicius et al. 2018), and FSDP2 in all tests.
    assert {numerics.parameters, numerics.gradients} == {Precision.FP32}


def test_each_word_of_the_command_line_has_a_row() -> None:
    assert {*map(str, Precision)} < {*NUMERICS}
