"""Constants fitted to whole training runs, kept apart from the profiles that they replace.

Mirrors `profiles/calibrations/*.yaml`. A calibration is of one runtime on one device; its values
are named by profile and field: "device.tensor_time_scale", "cluster.network.hop_s",
"runtime.host.layer_launch_s".
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from mist.errors import PlatformError
from mist.plans.provenance import Kind
from mist.platform.cluster import Cluster
from mist.platform.device import Device
from mist.platform.quantity import Quantity, Record
from mist.platform.runtime import Runtime

Profiles = tuple[Device, Cluster, Runtime]
LARGEST: Final = {"cluster.network.efficiency_ratio": 1.0}
SPREAD: Final = ("rest_deviation", "low_deviations", "high_deviations")


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration(Record):
    """What whole runs of one runtime on one device say about constants of the profiles.

    `covariance`: of the logarithms of the values, in their order, the lower half row by row; none
    where it is not known. `rest_deviation`: standard deviation of the logarithm of measured over
    predicted steps that no value explains. Eight of ten runs lie between `low_deviations` below
    and `high_deviations` above the prediction (`mist.platform.step_interval`); their source says
    which runs.
    """

    schema: Literal["mist.calibration/1"]
    runtime: str
    device: str
    rest_deviation: Quantity
    low_deviations: Quantity
    high_deviations: Quantity
    values: Mapping[str, Quantity]
    covariance: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        for path in self.values:
            if path.split(".")[0] not in ("device", "cluster", "runtime"):
                raise ValueError(f"{path} does not begin with device, cluster or runtime")
        if self.covariance and [*map(len, self.covariance)] != [*range(1, len(self.values) + 1)]:
            raise ValueError(f"covariance is not the lower half of {len(self.values)} rows")

    @property
    def what(self) -> str:
        """In a line, what the calibration is of."""
        return f"{self.runtime} on {self.device}; steps spread by {self.rest_deviation.value:.0%}"

    @property
    def matrix(self) -> NDArray[np.float64]:
        """The covariance in full, [K, K]; zeros where it is not known."""
        full = np.zeros((len(self.values), len(self.values)))
        for k, row in enumerate(self.covariance):
            full[k, : k + 1] = full[: k + 1, k] = row
        return full

    def applied(self, profiles: Profiles) -> Profiles:
        """The profiles with these values. Raises PlatformError for one that they cannot have."""
        return with_values(profiles, self.values)


def with_values(profiles: Profiles, values: Mapping[str, Quantity]) -> Profiles:
    """Profiles with some figures replaced, named as in a calibration.

    Raises PlatformError for a figure that they do not have, or that cannot be 0 and is.
    """
    device, cluster, runtime = profiles
    records: dict[str, Any] = {"device": device, "cluster": cluster, "runtime": runtime}
    for path, quantity in values.items():
        # Records are frozen: each value makes new ones along its path.
        family, *names = path.split(".")
        try:
            records[family] = _with(records[family], names, quantity)
        except ValueError as error:
            raise PlatformError(f"a calibration sets {path}: {error}.") from error
    return records["device"], records["cluster"], records["runtime"]


def figure_at(profiles: Profiles, path: str) -> Quantity:
    """A figure of profiles, named as in a calibration. Raises KeyError where there is none."""
    family, *fields = path.split(".")
    record: object = dict(zip(("device", "cluster", "runtime"), profiles, strict=True))[family]
    for name in fields:
        record = getattr(record, name, None)
    if not isinstance(record, Quantity):
        raise KeyError(path)
    return record


def scaled(path: str, figure: Quantity, factor: float) -> Quantity:
    """A figure that is so many times as large, or the largest that it can be."""
    return figure.times(min(factor, LARGEST.get(path, np.inf) / figure.value))


def calibrated(value: float, source: str) -> Quantity:
    """A fitted constant; more than four digits say nothing."""
    # Rounded here, so that the file and what is planned with it have the same value.
    return Quantity(value=float(f"{value:.4g}"), source=source, kind=Kind.CALIBRATED)


def dump_calibration(calibration: Calibration, comment: str) -> str:
    """The calibration as the text of its YAML file."""
    import yaml

    def written(quantity: Quantity) -> dict[str, object]:
        return {"value": quantity.value, "source": quantity.source, "kind": quantity.kind.value}

    data: dict[str, object] = {
        "schema": calibration.schema,
        "runtime": calibration.runtime,
        "device": calibration.device,
        **{name: written(getattr(calibration, name)) for name in SPREAD},
        "values": {name: written(each) for name, each in calibration.values.items()},
    }
    if calibration.covariance:
        data["covariance"] = [[*row] for row in calibration.covariance]
    text = yaml.safe_dump(data, sort_keys=False, width=1000, default_flow_style=None)
    return f"# {comment}\n{text}"


def _with(record: Any, names: list[str], quantity: Quantity) -> Any:  # noqa: ANN401 - any record
    """A record with one of its quantities, deep inside, replaced. Raises ValueError."""
    name, *rest = names or ("nothing",)
    known = getattr(record, name, None)
    if not isinstance(known, Record) or (isinstance(known, Quantity) is bool(rest)):
        raise ValueError(f"{type(record).__name__} has no figure {name}")
    return replace(record, **{name: _with(known, rest, quantity) if rest else quantity})
