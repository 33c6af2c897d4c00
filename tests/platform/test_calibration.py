"""Calibrations: they replace what they name, and every one that ships fits its profiles."""

from dataclasses import replace

import numpy as np
import pytest

from mist.errors import PlatformError
from mist.plans.provenance import Kind
from mist.platform import load_platform
from mist.platform.calibration import Calibration
from mist.platform.profiles import load_cluster, load_device, load_runtime, load_shipped
from mist.platform.quantity import Quantity
from mist.validate.sources import load_sources
from tests.platform.samples import PROFILES, RUNTIMES

NUMBER = Quantity(value=2.5, source="runs", kind=Kind.CALIBRATED)
SHIPPED = [
    load_shipped(f"calibrations/{path.name}", Calibration)
    for path in sorted((PROFILES / "calibrations").glob("*.yaml"))
]


def calibration(path: str) -> Calibration:
    return Calibration(
        schema="mist.calibration/1",
        runtime="torch",
        device="h100-sxm",
        rest_deviation=NUMBER,
        low_deviations=NUMBER,
        high_deviations=NUMBER,
        values={path: NUMBER},
    )


def test_a_value_deep_inside_is_replaced() -> None:
    held = (
        load_device("h100-sxm").profile,
        load_cluster("dgx-h100").profile,
        load_runtime("torch").profile,
    )
    device, cluster, runtime = calibration("cluster.network.hop_s").applied(held)
    assert cluster.network.hop_s == NUMBER
    network = replace(cluster.network, hop_s=held[1].network.hop_s)
    assert (device, replace(cluster, network=network), runtime) == held


def test_what_a_profile_does_not_have_is_refused() -> None:
    held = (
        load_device("h100-sxm").profile,
        load_cluster("dgx-h100").profile,
        load_runtime("torch").profile,
    )
    with pytest.raises(PlatformError, match="HostLaunch has no figure patience_s"):
        calibration("runtime.host.patience_s").applied(held)
    with pytest.raises(ValueError, match="does not begin with"):
        calibration("weather.rain")


@pytest.mark.parametrize("each", SHIPPED, ids=lambda each: f"{each.runtime}-{each.device}")
def test_a_calibration_that_ships_applies(each: Calibration) -> None:
    device = load_device(each.device).profile
    cluster = load_cluster(device.default_cluster).profile
    runtime = load_runtime(each.runtime).profile
    assert each.applied((device, cluster, runtime)) != (device, cluster, runtime)
    assert all(value.kind is Kind.CALIBRATED for value in each.values.values())


@pytest.mark.parametrize("each", SHIPPED, ids=lambda each: f"{each.runtime}-{each.device}")
def test_a_covariance_that_ships_is_one(each: Calibration) -> None:
    half = each.covariance
    matrix = np.array(
        [[half[max(i, j)][min(i, j)] for j in range(len(half))] for i in range(len(half))]
    )
    assert np.linalg.eigvalsh(matrix).min() > 0  # and so a normal distribution has it
    assert len(half) == len(each.values)
    assert np.array_equal(each.matrix, matrix)


def test_a_covariance_that_is_no_half_is_refused() -> None:
    with pytest.raises(ValueError, match="covariance is not the lower half of 1 rows"):
        replace(calibration("cluster.network.hop_s"), covariance=((0.1,), (0.0, 0.2)))


def test_what_sources_name_ships() -> None:
    table = load_sources()
    assert {source.runtime for source in table.sources.values()} <= set(RUNTIMES)
    for hardware in table.gpus.values():
        device = load_device(hardware.device).profile
        assert device.name in load_cluster(hardware.cluster).profile.devices


def test_a_plan_for_a_calibrated_runtime_says_so() -> None:
    platform = load_platform(num_gpus=8, gpu="h100-sxm", cluster=None, runtime="nanotron")
    plain = load_platform(num_gpus=8, gpu="l40s", cluster=None, runtime="nanotron")
    assert platform.calibration is not None and plain.calibration is None
    assert "nanotron-h100-sxm" in platform.profile_hashes()
    assert platform.runtime.host.layer_launch_s.kind is Kind.CALIBRATED
    assert platform.uncertainty_basis == platform.calibration.high_deviations.source
    assert platform.uncertainty_basis != plain.uncertainty_basis
    assert platform.runtime_hash != plain.runtime_hash
