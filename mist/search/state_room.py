"""Whether all devices, with the memory of their hosts, have room for what lives of every parameter.

However a layout divides and offloads, some rank holds each weight, master copy and moment once. So

    trained parameters x bytes of these  <=  devices x bytes of a device + nodes x bytes of a host

or nothing fits. Gradients are left out: some runtimes hold them for a layer at a time.
"""

import math
from dataclasses import dataclass
from typing import Final

from mist.errors import StatesTooLarge
from mist.plans.numerics import NUMERICS
from mist.plans.plan import Limits
from mist.plans.workload import Optimizer, Precision
from mist.platform.selection import Platform
from mist.platform.states import StateItem, sum_states
from mist.symbolic.job import Job
from mist.units import format_bytes, format_count

LIVE: Final = (StateItem.WEIGHTS, StateItem.MASTER, StateItem.MOMENTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class StateRoom:
    """What lives of a model, and where: known before anything of it is traced or priced.

    `limits`: of one GPU of the platform and of its share of a host.
    """

    name: str
    num_trainable: int
    platform: Platform
    precision: Precision
    optimizer: Optimizer
    limits: Limits

    def refuse(self) -> None:
        """Raise StatesTooLarge for a model that no layout has room for."""
        if not self.fits:
            raise StatesTooLarge(self._words())

    @property
    def fits(self) -> bool:
        """Whether the states fit the devices and hosts, each parameter held once."""
        device_and_host_bytes = self.limits.device_bytes + self.limits.host_bytes
        return self.live_bytes <= self.platform.num_gpus * device_and_host_bytes

    @property
    def live_bytes(self) -> float:
        """Bytes of weights, master copies and moments of the whole model, each held once."""
        return self.num_trainable * self.bytes_per_param

    @property
    def bytes_per_param(self) -> float:
        """The same of one parameter."""
        runtime = self.platform.runtime
        states = runtime.states_of(NUMERICS[self.precision].compute, self.optimizer)
        sums = (sum_states(states, zero, LIVE) for zero in runtime.knobs.zero_levels)
        return min(each.bytes_per_param(1) for each in sums)

    def _words(self) -> str:
        """What is needed, where it may lie, and the least GPUs that have room for it."""
        num_gpus, limits = self.platform.num_gpus, self.limits
        return (
            f"{self.name} does not fit on {num_gpus} x {self.platform.device.name}. Weights, "
            f"master copies and moments of {format_count(self.num_trainable)} trained parameters "
            f"take {format_bytes(self.live_bytes)} ({self.bytes_per_param:g} bytes of each), "
            "however they are divided and offloaded. A plan may use "
            f"{format_bytes(num_gpus * limits.device_bytes)} on these GPUs and "
            f"{format_bytes(num_gpus * limits.host_bytes)} in their hosts. At least "
            f"{least_gpus(self.platform, self.live_bytes, limits)} such GPUs have room for them, "
            "before activations. Try more GPUs, more host memory (--host-memory) or a smaller "
            "model."
        )


def state_room(job: Job, limits: Limits) -> StateRoom:
    """Of a model that is traced."""
    return StateRoom(
        name=job.facts.name,
        num_trainable=job.facts.num_trainable,
        platform=job.platform,
        precision=job.workload.precision,
        optimizer=job.workload.optimizer,
        limits=limits,
    )


def least_gpus(platform: Platform, num_bytes: float, limits: Limits) -> int:
    """The least GPUs of a cluster that have room for `num_bytes`, with the hosts of their nodes.

    `limits`: of one GPU of the platform and of its share of a host.
    """
    full_node = platform.cluster.num_gpus_per_node
    host_bytes = limits.host_bytes * platform.gpus_per_node
    alone = math.ceil((num_bytes - host_bytes) / limits.device_bytes)
    if alone <= full_node:
        return max(alone, 1)
    return full_node * math.ceil(num_bytes / (host_bytes + full_node * limits.device_bytes))
