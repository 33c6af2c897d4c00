"""Whether all devices, with the memory of their hosts, have room for what lives of every parameter.

However a layout divides and offloads, some rank holds each weight, master copy and moment once. So

    trained parameters x bytes of these  <=  devices x (bytes of a device + bytes of a host)

or nothing fits. Gradients are left out: some runtimes hold them for a layer at a time.
"""

from typing import Final

from mist.errors import Infeasible
from mist.plans.numerics import NUMERICS
from mist.plans.plan import Limits
from mist.platform.states import StateItem, sum_states
from mist.symbolic.job import Job

LIVE: Final = (StateItem.WEIGHTS, StateItem.MASTER, StateItem.MOMENTS)


def refuse_without_room(job: Job, limits: Limits) -> None:
    """Raise Infeasible for a model that no layout has room for, before any is searched."""
    device_and_host_bytes = limits.device_bytes + limits.host_bytes
    if live_bytes(job) > job.platform.num_gpus * device_and_host_bytes:
        raise Infeasible(f"{job.facts.name} does not fit.")


def live_bytes(job: Job) -> float:
    """Bytes of weights, master copies and moments of the whole model, each held once."""
    runtime, workload = job.platform.runtime, job.workload
    states = runtime.states_of(NUMERICS[workload.precision].compute, workload.optimizer)
    sums = (sum_states(states, zero, LIVE) for zero in runtime.knobs.zero_levels)
    return job.facts.num_trainable * min(each.bytes_per_param(1) for each in sums)
