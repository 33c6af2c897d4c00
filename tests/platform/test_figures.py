"""Every figure of a device and a cluster at 0, and at the ends of what a figure may be.

It is refused, or the prediction is a number: NaN would compare as "fits".
"""

import math
import warnings
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeAlias

import pytest

from mist.errors import PlatformError
from mist.plans.plan import Layout
from mist.platform.calibration import with_values
from mist.platform.quantity import LARGEST_FIGURE, LEAST_FIGURE, Quantity, figure_words
from mist.symbolic.compile import compile_model
from mist.symbolic.estimate import estimate
from mist.symbolic.job import Job, make_job
from tests.test_estimate import stages_of
from tests.toys import adamw_setting, toy_graph, toy_platform, toy_programs, toy_workload

JOB: Job = make_job(toy_programs(toy_graph()), toy_platform(8, "l4"), toy_workload())
LAYOUT = Layout(stages=stages_of(JOB, 2, dp=2, tp=2), num_micro_batches=16)
Steps = tuple[Any, ...]
Profile: TypeAlias = Any  # or a part of one, down to a figure


def figures(record: object, at: Steps = ()) -> Iterator[Steps]:
    """The places of all figures in a profile."""
    if isinstance(record, Quantity):
        yield at
    elif is_dataclass(record):
        for item in fields(record):
            yield from figures(getattr(record, item.name), (*at, item.name))
    elif isinstance(record, dict):
        for key, value in record.items():
            yield from figures(value, (*at, key))
    elif isinstance(record, tuple):
        for index, value in enumerate(record):
            yield from figures(value, (*at, index))


def changed(record: Profile, at: Steps, value: float) -> Profile:
    """A profile with one figure changed."""
    if not at:
        return replace(record, value=value)
    step, *rest = at
    if is_dataclass(record):
        return replace(record, **{step: changed(getattr(record, step), tuple(rest), value)})
    items = dict(record) if isinstance(record, dict) else dict(enumerate(record))
    items[step] = changed(items[step], tuple(rest), value)
    return items if isinstance(record, dict) else tuple(items.values())


PLACES = [
    (family, at)
    for family in ("device", "cluster")
    for at in figures(getattr(JOB.platform, family))
]


def test_the_figures_are_found() -> None:
    names = {".".join(map(str, (family, *at))) for family, at in PLACES}
    assert {"device.hbm_bytes_per_s", "device.gemm.bf16.efficiency_ratio"} <= names
    assert {"cluster.network.hop_s", "cluster.p2p_in_node.bytes_per_s"} <= names


@pytest.mark.parametrize("value", [0.0, LEAST_FIGURE, LARGEST_FIGURE])
def test_a_figure_gives_a_prediction_or_is_refused(value: float) -> None:
    num_refused = 0
    for family, at in PLACES:
        try:
            profile = changed(getattr(JOB.platform, family), at, value)
            platform = replace(JOB.platform, **{family: profile})
            job = make_job(JOB.programs, platform, JOB.workload)
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # of numpy: a division by zero is none of ours
                found = estimate(job, LAYOUT)
        except (
            ValueError,
            PlatformError,
        ):  # of the file, as its reader reports it; of the estimate
            num_refused += 1
            continue
        numbers = [found.step_s, found.mfu, *(stage.peak_bytes for stage in found.stages)]
        assert all(map(math.isfinite, numbers)), (family, at)
    # Most figures may be 0, as latencies are; rates and efficiencies may not.
    assert 0 < num_refused < len(PLACES)


@pytest.mark.slow  # compiles the costs anew for each figure
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("value", [0.0, LEAST_FIGURE, LARGEST_FIGURE])
def test_a_figure_of_a_runtime_gives_a_prediction_or_is_refused(value: float) -> None:
    graph, num_refused, places = toy_graph(), 0, [*figures(JOB.platform.runtime)]
    assert len(places) > 20
    for at in places:
        try:
            runtime = changed(JOB.platform.runtime, at, value)
            platform = replace(JOB.platform, runtime=runtime)
            programs = compile_model(graph, adamw_setting(runtime))
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = estimate(make_job(programs, platform, JOB.workload), LAYOUT)
        except (ValueError, PlatformError):
            num_refused += 1
            continue
        numbers = [found.step_s, found.mfu, *(stage.peak_bytes for stage in found.stages)]
        assert all(map(math.isfinite, numbers)), at
    assert num_refused < len(places)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, 1e300, 1e-300])
def test_numbers_that_no_figure_is(value: float) -> None:
    with pytest.raises(ValueError, match="value"):
        replace(JOB.platform.device.hbm_bytes_per_s, value=value)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("device.hbm_bytes_per_s", "hbm_bytes_per_s is 0"),
        ("device.tensor_time_scale", "tensor_time_scale is 0"),  # a calibration fits at least it
        ("cluster.network.nic_bytes_per_s", "nic_bytes_per_s is 0"),
        ("device.name", "has no figure name"),
        ("device.usable_bytes", "has no figure usable_bytes"),
        ("device", "has no figure nothing"),
        ("cluster.network", "has no figure network"),
        ("cluster.network.hop_s.value", "has no figure hop_s"),
    ],
)
def test_a_calibration_sets_no_rate_to_zero_and_nothing_else(path: str, words: str) -> None:
    profiles = (JOB.platform.device, JOB.platform.cluster, JOB.platform.runtime)
    zero = replace(JOB.platform.cluster.network.hop_s, value=0.0)
    with pytest.raises(PlatformError, match=words):
        with_values(profiles, {path: zero})
    assert with_values(profiles, {"cluster.network.hop_s": zero})[1].network.hop_s.value == 0.0


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("device.memory_bytes", 4e9, "3.7 GiB"),
        ("cluster.network.nic_bytes_per_s", 5.27e10, "52.7 GB/s"),
        ("cluster.network.hop_s", 1e-5, "10.0 us"),
        ("device.tensor_time_scale", 1.2345, "1.2345"),
        ("runtime.traffic.optimizer_bytes_per_param", 30.0, "30 B/param"),
    ],
)
def test_figures_in_words(path: str, value: float, words: str) -> None:
    assert figure_words(path, value) == words


def test_figures_in_few_digits() -> None:
    assert figure_words("device.tensor_time_scale", 1.2345, num_digits=2) == "1.2"
