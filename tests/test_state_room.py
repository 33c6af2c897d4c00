"""No layout is refused that the exact least memory of all layouts has room for."""

from itertools import chain, count
from math import ceil

import pytest

from mist.errors import StatesTooLarge
from mist.pareto.least_memory import leanest
from mist.plans.plan import Limits
from mist.plans.search_space import SPACES
from mist.search.state_room import least_gpus, state_room
from mist.units import MIB
from tests.toys import toy_job

NONE = Limits(device_bytes=0.0, host_bytes=0.0)


def test_bytes_are_those_of_mixed_precision_adamw() -> None:
    """Torch in bf16: a master copy and two moments in fp32 (Rajbhandari et al. 2020: 12 bytes)."""
    job = toy_job()
    assert state_room(job, NONE).live_bytes == 12 * job.facts.num_params


@pytest.mark.parametrize("host_bytes", [0.0, 1e6, 1e12])
def test_what_is_refused_has_no_layout(host_bytes: float) -> None:
    job = toy_job()
    most = state_room(job, NONE).live_bytes / job.platform.num_gpus - host_bytes
    limits = Limits(device_bytes=most * 0.999, host_bytes=host_bytes)
    if most <= 0:
        state_room(job, limits).refuse()
        return
    with pytest.raises(StatesTooLarge, match=r"^toy does not fit on 8 x h100-sxm\. Weights, "):
        state_room(job, limits).refuse()
    least = leanest(job, SPACES["mist"], host_bytes=host_bytes).peak_bytes
    assert least > limits.device_bytes


def test_what_has_room_is_not_refused() -> None:
    job = toy_job()
    least = leanest(job, SPACES["mist"], host_bytes=1e12).peak_bytes
    state_room(job, Limits(device_bytes=least, host_bytes=1e12)).refuse()


def test_words_say_what_is_needed_where_it_may_lie_and_what_has_room() -> None:
    """12 bytes of 133 M parameters are 1.49 GiB; 8 GPUs of 64 MiB and one host of 512 MiB are 1."""
    job = toy_job()
    assert round(state_room(job, NONE).live_bytes / MIB) == 1518
    limits = Limits(device_bytes=64 * MIB, host_bytes=64 * MIB)
    with pytest.raises(StatesTooLarge) as refusal:
        state_room(job, limits).refuse()
    assert str(refusal.value) == (
        "toy does not fit on 8 x h100-sxm. Weights, master copies and moments of 133 M trained "
        "parameters take 1.5 GiB (12 bytes of each), however they are divided and offloaded. A "
        "plan may use 512.0 MiB on these GPUs and 512.0 MiB in their hosts. At least 16 such GPUs "
        "have room for them, before activations. Try more GPUs, more host memory (--host-memory) "
        "or a smaller model."
    )


@pytest.mark.parametrize("num_gpus", [1, 2, 8, 16])
@pytest.mark.parametrize("host_bytes", [0.0, 300.0])
def test_least_gpus_are_the_first_count_with_room(num_gpus: int, host_bytes: float) -> None:
    """Counts that a cluster has are those within a node and whole nodes: tried one by one."""
    platform = toy_job(num_gpus=num_gpus).platform
    limits = Limits(device_bytes=100.0, host_bytes=host_bytes / platform.gpus_per_node)
    for num_bytes in range(1, 4000, 7):
        counts = chain(range(1, 8), count(8, 8))
        room = ((n, 100 * n + host_bytes * ceil(n / 8)) for n in counts)
        first = next(n for n, room_bytes in room if room_bytes >= num_bytes)
        assert least_gpus(platform, num_bytes, limits) == first
