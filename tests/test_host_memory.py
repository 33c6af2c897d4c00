"""Pinned host memory is rounded as torch's allocator rounds it, of the tensors that exec makes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mist.plans.host_memory import pinned_bytes
from tests.sample_plans import host_need


@given(size=st.integers(1, 2**50))
def test_a_pinned_tensor_takes_the_next_power_of_two(size: int) -> None:
    """As PowerOf2Ceil of LLVM does it, in whole numbers."""
    assert pinned_bytes(size) == 1 << (size - 1).bit_length()


def test_no_tensor_takes_nothing() -> None:
    assert pinned_bytes(np.array([0.0, 1.0, 3.0])).tolist() == [0.0, 1.0, 4.0]


@pytest.mark.parametrize("shards", [1, 2, 3, 6, 8, 48])
def test_shards_of_a_power_of_two_are_not_rounded_twice(shards: int) -> None:
    assert pinned_bytes(2.0**30 * shards / shards) == 2**30


def test_what_to_try_is_enough_and_in_whole_gigabytes() -> None:
    need = host_need(324)  # of 256 GiB, which are 80 % of 320 GiB
    words, _, size = need.fix.partition(" ")
    num_bytes = int(size.removesuffix("GB")) * 10**9
    assert words == "--host-memory"
    assert 0 <= 0.8 * num_bytes - 324 * 2**30 < 0.8e9
    assert num_bytes == math.ceil(324 * 2**30 / 0.8 / 1e9) * 10**9
