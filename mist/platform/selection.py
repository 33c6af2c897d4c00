"""A platform: the device, cluster and runtime that a plan is for, and how many GPUs of it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from mist.errors import PlatformError
from mist.files import digest
from mist.plans.memory_chance import sure_margin
from mist.plans.workload import MOST_GPUS
from mist.platform.calibration import Calibration, Profiles
from mist.platform.cluster import Cluster
from mist.platform.device import Device
from mist.platform.machine import Machine
from mist.platform.overrides import NO_OVERRIDES, Overrides, overridden
from mist.platform.profiles import (
    Loaded,
    find_calibration,
    find_machine,
    is_path,
    load_cluster,
    load_device,
    load_runtime,
)
from mist.platform.quantity import Quantity
from mist.platform.runtime import Runtime
from mist.platform.step_interval import expected_error

DEFAULT_DEVICE = "h100-sxm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """What a plan is made for. `hashes`: "sha256:..." of each profile's file, by profile name.

    `calibration`: what whole runs said of the profiles; it is in them already, as `overrides` are:
    figures that the user set. `assumed`: sentences on what the user's words did not say, or said
    otherwise than the profiles.
    """

    device: Device
    cluster: Cluster
    runtime: Runtime
    num_gpus: int
    num_nodes: int
    hashes: Mapping[str, str]
    calibration: Calibration | None
    overrides: Overrides = field(default_factory=dict)
    assumed: tuple[str, ...] = ()

    @property
    def profiles(self) -> Profiles:
        """The three of them."""
        return self.device, self.cluster, self.runtime

    @property
    def gpus_per_node(self) -> int:
        """GPUs of the job on each of its nodes."""
        return self.num_gpus // self.num_nodes

    @property
    def usable_bytes(self) -> float:
        """Memory of a device that the allocator can reserve."""
        return self.device.usable_bytes

    @property
    def margin_ratio(self) -> float:
        """The margin that a plan leaves when the user sets none.

        What a chance of 98 % to fit needs, and at least what the allocator needs to be fast.
        """
        least = self.runtime.memory.margin_ratio.value
        return max(least, sure_margin(self.memory_uncertainty_ratio))

    def planned_bytes(self, margin: float) -> float:
        """Bytes that a plan may reserve: the usable bytes less a margin of 0..1 of them.

        Raises PlatformError when the margin leaves nothing or is negative.
        """
        if not 0.0 <= margin < 1.0:
            raise PlatformError(
                f"--margin {margin:g}: a margin is a ratio from 0 up to 1. Try 0.15."
            )
        return self.usable_bytes * (1.0 - margin)

    @property
    def host_memory(self) -> Quantity:
        """Bytes of host memory of one node."""
        return self.cluster.host_memory_of(self.device.name)

    def planned_host_bytes(self, margin: float) -> float:
        """Bytes of its node's memory that each rank may use: an equal share, less the margin."""
        return self.host_memory.value * (1.0 - margin) / self.gpus_per_node

    @property
    def step_error(self) -> Calibration | Quantity:
        """What is known of errors of step times: by a calibration, else the error to expect."""
        return self.calibration or expected_error(self.device, self.runtime)

    @property
    def uncertainty_basis(self) -> str:
        """Where the interval of a step time comes from."""
        known = self.step_error
        return known.source if isinstance(known, Quantity) else known.high_deviations.source

    @property
    def runtime_hash(self) -> str:
        """A digest of all that costs are compiled from: the runtime as it is calibrated and set."""
        names = [self.runtime.name, f"{self.runtime.name}-{self.device.name}"]
        words = [self.hashes[name] for name in names if name in self.hashes]
        own = sorted(item for item in self.overrides.items() if item[0].startswith("runtime."))
        return "\n".join([*words, *(f"{name}={value!r}" for name, value in own)])

    @property
    def memory_uncertainty_ratio(self) -> float:
        """Expected relative error of a peak memory prediction."""
        return self.runtime.uncertainty.memory_ratio.value

    def profile_hashes(self) -> dict[str, str]:
        """Content hashes of the three profiles, for a plan's provenance."""
        return dict(self.hashes)


def load_platform(
    *,
    num_gpus: int,
    gpu: str | None,
    cluster: str | None,
    runtime: str,
    overrides: Overrides = NO_OVERRIDES,
) -> Platform:
    """The platform that the options name; what is not given follows from what is.

    `cluster` may be the file of a measured machine. No GPU: the cluster's first device. No cluster:
    the GPU's default one. Neither: h100-sxm on dgx-h100. `overrides`: figures that
    the user sets in place of those of the profiles. Raises PlatformError for an unknown name or
    figure, a GPU that the cluster does not hold, or a number of GPUs that does not fill nodes.
    """
    software = load_runtime(runtime)
    machine = find_machine(cluster)
    profiles, hashes = (
        _named(gpu, cluster, software) if machine is None else _measured(gpu, machine, software)
    )
    hashes[software.profile.name] = software.sha256
    measured = None if machine is None else machine.profile.device.name
    name = f"{software.profile.name}-{profiles[0].name}"
    calibration = find_calibration(software.profile.name, profiles[0])
    if calibration is not None:
        profiles = calibration.profile.applied(profiles)
        # On a measured machine the calibration comes on top of its own values: the digest is of
        # both.
        hashes[name] = (
            digest(hashes.get(name, ""), calibration.sha256) if machine else calibration.sha256
        )
    # What the user says of these machines is surer than what whole runs said of others.
    profiles = overridden(profiles, overrides)
    return Platform(
        device=profiles[0],
        cluster=profiles[1],
        runtime=profiles[2],
        num_gpus=num_gpus,
        num_nodes=count_nodes(num_gpus, profiles[1]),
        hashes=hashes,
        calibration=calibration.profile if calibration else None,
        overrides=overrides,
        assumed=tuple(_assumed((measured or gpu, cluster, runtime), profiles)),
    )


def _assumed(asked: tuple[str | None, ...], profiles: Profiles) -> Iterator[str]:
    """What stands in for options that were left out, or that are written otherwise."""
    options = ("--gpu", "--cluster", "--runtime")
    device, cluster, runtime = profiles
    what = ((each.name, each.what) for each in (device, cluster, runtime))
    for option, name, (known, line) in zip(options, asked, what, strict=True):
        if name is None:
            yield f"{option} is not given: {known} is assumed ({line})"
        elif not is_path(name) and name != known:
            yield f"{option} {name} is taken for {known} ({line})"


Chosen = tuple[Profiles, dict[str, str]]  # device, cluster and runtime, and hashes of their files


def _named(gpu: str | None, cluster: str | None, software: Loaded[Runtime]) -> Chosen:
    """What profiles of their own say."""
    if gpu is None:
        fabric = load_cluster(cluster or load_device(DEFAULT_DEVICE).profile.default_cluster)
        device = load_device(fabric.profile.devices[0])
    else:
        device = load_device(gpu)
        fabric = load_cluster(cluster or device.profile.default_cluster)
    check_carries(fabric.profile, device.profile)
    hashes = {item.profile.name: item.sha256 for item in (device, fabric)}
    return (device.profile, fabric.profile, software.profile), hashes


def _measured(gpu: str | None, machine: Loaded[Machine], software: Loaded[Runtime]) -> Chosen:
    """What one file of a measured machine says; the runtime is as this machine runs it."""
    profile = machine.profile
    if gpu not in (None, profile.device.name):
        raise PlatformError(
            f"--gpu {gpu}: {machine.path} is of {profile.device.name}. Leave --gpu out."
        )
    profiles = profile.with_runtime(software.profile)
    names = (profile.device.name, profile.cluster.name, f"{profile.runtime}-{profile.device.name}")
    return profiles, dict.fromkeys(names, machine.sha256)


def check_carries(cluster: Cluster, device: Device) -> None:
    """Raises PlatformError when the cluster does not hold that device."""
    if device.name not in cluster.devices:
        raise PlatformError(
            f"--gpu {device.name}: cluster {cluster.name} holds {' or '.join(cluster.devices)}. "
            f"Try --cluster {device.default_cluster}."
        )


def count_nodes(num_gpus: int, cluster: Cluster) -> int:
    """Nodes that `num_gpus` GPUs take: one, or whole nodes.

    Raises PlatformError, naming the nearest counts that work.
    """
    per_node, limit = cluster.num_gpus_per_node, cluster.num_nodes_limit
    if num_gpus < 1:
        raise PlatformError(
            f"--gpus {num_gpus}: a plan needs at least one GPU. Try --gpus {per_node}."
        )
    if limit is not None and num_gpus > limit * per_node:
        raise PlatformError(
            f"--gpus {num_gpus}: {cluster.name} has at most {limit * per_node} GPUs "
            f"(nodes: {limit}, GPUs per node: {per_node}). Try --gpus {limit * per_node}."
        )
    if num_gpus > MOST_GPUS:
        raise PlatformError(
            f"--gpus {num_gpus} is more than Mist plans for. Use at most {MOST_GPUS}."
        )
    if num_gpus > per_node and num_gpus % per_node:
        below = num_gpus // per_node * per_node  # and the next is within the limit, a multiple too
        raise PlatformError(
            f"--gpus {num_gpus}: {cluster.name} has {per_node} GPUs per node, so a job takes "
            f"at most {per_node} GPUs or a multiple of {per_node}. "
            f"Try --gpus {below} or {below + per_node}."
        )
    return math.ceil(num_gpus / per_node)
