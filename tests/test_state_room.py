"""No layout is refused that the exact least memory of all layouts has room for."""

import pytest

from mist.errors import Infeasible
from mist.pareto.least_memory import leanest
from mist.plans.plan import Limits
from mist.plans.search_space import SPACES
from mist.search.state_room import live_bytes, refuse_without_room
from tests.toys import toy_job


def test_bytes_are_those_of_mixed_precision_adamw() -> None:
    """Torch in bf16: a master copy and two moments in fp32 (Rajbhandari et al. 2020: 12 bytes)."""
    job = toy_job()
    assert live_bytes(job) == 12 * job.facts.num_params


@pytest.mark.parametrize("host_bytes", [0.0, 1e6, 1e12])
def test_what_is_refused_has_no_layout(host_bytes: float) -> None:
    job = toy_job()
    most = live_bytes(job) / job.platform.num_gpus - host_bytes
    limits = Limits(device_bytes=most * 0.999, host_bytes=host_bytes)
    if most <= 0:
        refuse_without_room(job, limits)
        return
    with pytest.raises(Infeasible) as refusal:
        refuse_without_room(job, limits)
    assert str(refusal.value) == "toy does not fit."
    least = leanest(job, SPACES["mist"], host_bytes=host_bytes).peak_bytes
    assert least > limits.device_bytes


def test_what_has_room_is_not_refused() -> None:
    job = toy_job()
    least = leanest(job, SPACES["mist"], host_bytes=1e12).peak_bytes
    refuse_without_room(job, Limits(device_bytes=least, host_bytes=1e12))
