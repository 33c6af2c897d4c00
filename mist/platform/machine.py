"""A machine that was measured: device, cluster, and what its figures change in a runtime.

One file, written by `mist profile`; `--cluster FILE.yaml` plans for it. `values` are named as in a
calibration ("runtime.host.layer_launch_s") and hold for `runtime` only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mist.platform.calibration import Profiles, with_values
from mist.platform.cluster import Cluster
from mist.platform.device import Device
from mist.platform.quantity import Quantity, Record
from mist.platform.runtime import Runtime

SCHEMA: Literal["mist.machine/1"] = "mist.machine/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine(Record):
    """What was measured on one machine. `what`: the machine, and when and how it was measured.

    Raises ValueError when the parts do not belong together.
    """

    schema: Literal["mist.machine/1"]
    what: str
    runtime: str
    device: Device
    cluster: Cluster
    values: Mapping[str, Quantity]

    def __post_init__(self) -> None:
        if self.cluster.devices != (self.device.name,):
            raise ValueError(
                f"cluster.devices must be [{self.device.name}], found {list(self.cluster.devices)}"
            )
        for path in self.values:
            if not path.startswith("runtime."):
                raise ValueError(f"values: {path} does not begin with runtime")

    def with_runtime(self, runtime: Runtime) -> Profiles:
        """Device, cluster, and a runtime as this machine runs it; another one stays as it is.

        Raises PlatformError for a value that the runtime has no figure for.
        """
        # Host overheads are of the framework that was running.
        values = self.values if runtime.name == self.runtime else {}
        return with_values((self.device, self.cluster, runtime), values)


def dump_machine(machine: Machine) -> str:
    """The machine as the text of its YAML file."""
    import yaml
    from pydantic import TypeAdapter

    data = TypeAdapter(Machine).dump_python(machine, mode="json", exclude_defaults=True)
    return "# Written by mist profile.\n" + yaml.safe_dump(data, sort_keys=False, width=1000)
