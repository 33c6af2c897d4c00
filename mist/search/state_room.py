"""Whether all devices, with the memory of their hosts, have room for what lives of every parameter.

However a layout divides and offloads, some rank holds each weight, master copy and moment once. So

    trained parameters x bytes of these  <=  devices x bytes of a device + nodes x bytes of a host

or nothing fits. Gradients are left out: some runtimes hold them for a layer at a time.
"""

import math
from typing import Final

from mist.errors import StatesTooLarge
from mist.plans.numerics import NUMERICS
from mist.plans.plan import Limits
from mist.platform.selection import Platform
from mist.platform.states import StateItem, sum_states
from mist.symbolic.job import Job
from mist.units import format_bytes, format_count

LIVE: Final = (StateItem.WEIGHTS, StateItem.MASTER, StateItem.MOMENTS)


def refuse_without_room(job: Job, limits: Limits) -> None:
    """Raise StatesTooLarge for a model that no layout has room for, before any is priced."""
    if not has_state_room(job, limits):
        raise StatesTooLarge(_words(job, limits))


def has_state_room(job: Job, limits: Limits) -> bool:
    """Whether the states fit the devices and hosts of the job, each parameter held once."""
    device_and_host_bytes = limits.device_bytes + limits.host_bytes
    return live_bytes(job) <= job.platform.num_gpus * device_and_host_bytes


def live_bytes(job: Job) -> float:
    """Bytes of weights, master copies and moments of the whole model, each held once."""
    return job.facts.num_trainable * _bytes_per_param(job)


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


def _bytes_per_param(job: Job) -> float:
    runtime, workload = job.platform.runtime, job.workload
    states = runtime.states_of(NUMERICS[workload.precision].compute, workload.optimizer)
    sums = (sum_states(states, zero, LIVE) for zero in runtime.knobs.zero_levels)
    return min(each.bytes_per_param(1) for each in sums)


def _words(job: Job, limits: Limits) -> str:
    """What is needed, where it may lie, and the least GPUs that have room for it."""
    platform, num_bytes = job.platform, live_bytes(job)
    num_gpus, device = platform.num_gpus, platform.device.name
    return (
        f"{job.facts.name} does not fit on {num_gpus} x {device}. Weights, master copies and "
        f"moments of {format_count(job.facts.num_trainable)} trained parameters take "
        f"{format_bytes(num_bytes)} ({_bytes_per_param(job):g} bytes of each), however they are "
        f"divided and offloaded. A plan may use {format_bytes(num_gpus * limits.device_bytes)} on "
        f"these GPUs and {format_bytes(num_gpus * limits.host_bytes)} in their hosts. At least "
        f"{least_gpus(platform, num_bytes, limits)} such GPUs have room for them, before "
        "activations. Try more GPUs, more host memory (--host-memory) or a smaller model."
    )
