"""What a plan loses where figures are wrong: the robust choice beside the fastest plan.

Each job is searched as `mist plan` does. Then its pool is priced in 50 random draws, other than
those that chose: products and attention x U(.9, 1.1), share of the network U(.4, 1) (where it is
fitted: x U(.6, 1.4)), link to host memory x U(.5, 1), slowdown of compute U(0, .3), and latency of
a hop x 1 to 7 in a second table. Regret: how much slower a plan is than the fastest of the draw
among the pool and what searches of some draws found.

python benchmarks/robustness.py [JOB ...]     words of the job names
"""

import sys
import time
from dataclasses import replace
from typing import Final

import numpy as np
from paper_models import machine, paper_question, prepared

from mist.pareto.layouts import PricedLayout, plain_layout
from mist.plans.breakdown import layout_words
from mist.plans.plan import Limits
from mist.plans.search_space import DEFAULT, SPACES
from mist.platform.cluster import Cluster
from mist.platform.device import Device
from mist.search.robust_choice import steps_on
from mist.search.tune import tune
from mist.symbolic.job import Job, on_profiles
from mist.workflow.request import Question
from mist.workflow.robust_planning import Robust, chosen_robustly

JOBS: Final = {
    "8B, 16 H100": Question(model="llama3-8b", num_gpus=16),
    "13B, 8 A100-40": replace(
        paper_question("gpt-13b", "l4"), num_gpus=8, gpu="a100-sxm-40", cluster=None
    ),
    "70B, 64 H100": Question(model="llama3-70b", num_gpus=64),
    "70B, 512 H100": Question(model="llama3-70b", num_gpus=512, seq_len=4096, global_batch=1024),
    "405B, 1024 H100": Question(model="llama3-405b", num_gpus=1024, global_batch=1024),
    "22B, 32 L4": paper_question("gpt-22b", "l4"),
}
NUM_DRAWS: Final = 50
NUM_SEARCHED: Final = 2  # draws that are searched whole, so that the pool is not its own judge


def drawn(job: Job, random: np.random.Generator, *, hops: bool) -> Job:
    """The job on a platform drawn at random."""
    platform = job.platform
    device, cluster = platform.device, platform.cluster
    link, products, attention = random.uniform((0.5, 0.9, 0.9), (1.0, 1.1, 1.1))
    share, slowdown, latency = random.uniform((0.0, 0.0, 0.0), (1.0, 0.3, 1.0))
    if cluster.contention is None:
        device = replace(
            device,
            host_to_device_bytes_per_s=device.host_to_device_bytes_per_s.times(link),
            device_to_host_bytes_per_s=device.device_to_host_bytes_per_s.times(link),
        )
    device = _computing(device, products, attention)
    cluster = _network(cluster, share, latency if hops else 0.0)
    overlap = platform.runtime.overlap
    slow = replace(overlap.compute_slowdown_ratio, value=slowdown)
    runtime = replace(platform.runtime, overlap=replace(overlap, compute_slowdown_ratio=slow))
    return on_profiles(job, (device, cluster, runtime))


def _computing(device: Device, products: float, attention: float) -> Device:
    laws = tuple(
        replace(law, efficiency_ratio=law.efficiency_ratio.times(attention / products))
        for law in device.flash_attention.laws
    )
    scale = device.tensor_time_scale.times(1 / products)
    return replace(
        device,
        tensor_time_scale=scale,
        flash_attention=replace(device.flash_attention, laws=laws),
    )


def _network(cluster: Cluster, share: float, latency: float) -> Cluster:
    network = cluster.network
    efficiency = network.efficiency_ratio
    if efficiency.kind.value == "fit":
        efficiency = efficiency.times(0.6 + 0.8 * share)
    else:
        efficiency = replace(efficiency, value=0.4 + 0.6 * share)
    hop = network.hop_s.times(7.0**latency)
    return replace(cluster, network=replace(network, efficiency_ratio=efficiency, hop_s=hop))


def searched(job: Job, limits: Limits) -> tuple[PricedLayout, ...]:
    found = tune(
        job,
        SPACES[DEFAULT],
        limits=limits,
        num_alternatives=0,
        progress=lambda _: None,
        method="dp",
    )
    return (found.best, *found.pool)


def report(name: str) -> None:
    """The lines of one job."""
    job, limits = prepared(JOBS[name])
    start = time.process_time()
    tuned = tune(job, SPACES[DEFAULT], limits=limits, num_alternatives=5, progress=lambda _: None)
    nominal_s = time.process_time() - start
    quiet = Robust(progress=lambda _: None, can_load=lambda _: True, is_late=lambda: False)
    choice = chosen_robustly(job, SPACES[DEFAULT], limits, tuned, quiet)
    spent_s = time.process_time() - start
    print(f"{name}: search {nominal_s:.1f} s, with the robust choice {spent_s:.1f} s")
    for hops in (False, True):
        random = np.random.default_rng(7)
        draws = [drawn(job, random, hops=hops) for _ in range(NUM_DRAWS)]
        pool = [choice.nominal.layout, choice.chosen.layout, *tuned.pool]
        for draw in draws[:NUM_SEARCHED]:
            pool += searched(draw, limits)
        steps_s = steps_on(draws, pool)
        regrets = steps_s / steps_s.min(axis=1, keepdims=True) - 1
        near = [i for i, one in enumerate(pool) if one.step_s <= 1.03 * tuned.best.step_s]
        least = regrets[:, near].mean(axis=0).min()
        for label, own in (("fastest", regrets[:, 0]), ("chosen", regrets[:, 1])):
            print(
                f"  hops {hops!s:<5} {label:<8} mean {own.mean():6.2%}  p95 "
                f"{np.quantile(own, 0.95):6.2%}  worst {own.max():6.2%}  (least mean {least:.2%})"
            )
    for label, judged in (("fastest", choice.nominal), ("chosen", choice.chosen)):
        words = layout_words(plain_layout(job, judged.layout))
        print(f"  {label:<8} {judged.layout.step_s:8.4g} s  {words}", flush=True)


def main() -> None:
    """Print the table."""
    print(machine())
    for name in JOBS:
        if not sys.argv[1:] or any(word in name for word in sys.argv[1:]):
            report(name)


if __name__ == "__main__":
    main()
