"""The search space as named columns: groups (stages, micro-batches) and their strategies.

A group fixes the number of stages S and of micro-batches G; all stages have N / S devices. Then the
samples per micro-step B / G are fixed too, and a strategy is (tp, zero): dp = N / S / tp and the
micro-batch B / G / dp follow. Strategies that break a rule of `mist.rules` are never generated.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mist.estimate import Job, strategy_columns
from mist.spec import SearchSpace

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """S pipeline stages, G micro-batches per step, and the strategies [K] of its stages."""

    num_stages: int
    num_micro_batches: int
    num_devices: int
    tp: Ints
    dp: Ints
    micro_batch: Ints
    zero: Ints

    @property
    def num_strategies(self) -> int:
        """K."""
        return len(self.tp)

    def columns(self, job: Job) -> dict[str, NDArray[np.float64]]:
        """The terms of the strategies, each of shape [K]."""
        return job.cost.terms(
            strategy_columns(
                job,
                num_stages=self.num_stages,
                dp=self.dp,
                tp=self.tp,
                micro_batch=self.micro_batch,
                zero=self.zero,
            )
        )


def groups(job: Job, space: SearchSpace) -> Iterator[Group]:
    """Every group with at least one strategy, fewest stages first."""
    num_gpus, batch = job.platform.num_gpus, job.workload.global_batch
    stage_counts = [s for s in divisors(num_gpus) if s <= job.num_layers]
    for num_stages in stage_counts:
        if space.pp is not None and num_stages not in space.pp:
            continue
        for num_micro_batches in divisors(batch):
            group = _group(job, space, num_stages, num_micro_batches)
            if group.num_strategies:
                yield group


def divisors(number: int) -> list[int]:
    """Divisors in ascending order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _group(job: Job, space: SearchSpace, num_stages: int, num_micro_batches: int) -> Group:
    devices = job.platform.num_gpus // num_stages
    samples = job.workload.global_batch // num_micro_batches
    degrees = [d for d in divisors(devices) if space.tp is None or d in space.tp]
    levels = [z for z in job.platform.runtime.knobs.zero_levels if z in space.zero]
    grid = np.meshgrid(np.array(degrees, dtype=int), np.array(levels, dtype=int), indexing="ij")
    tp, zero = (axis.ravel() for axis in grid)
    dp = devices // np.maximum(tp, 1)
    columns = {"tp": tp, "zero": zero, "dp": dp, "micro_batch": samples // np.maximum(dp, 1)}
    keep = _allowed(
        job, space, columns | {"num_stages": num_stages, "num_micro_batches": num_micro_batches}
    )
    return Group(
        num_stages=num_stages,
        num_micro_batches=num_micro_batches,
        num_devices=devices,
        **{name: column[keep] for name, column in columns.items()},
    )


def _allowed(job: Job, space: SearchSpace, columns: dict[str, Ints | int]) -> NDArray[np.bool_]:
    """Rules hold, the user's restrictions hold, and sharding is asked only of several ranks."""
    keep = np.asarray((columns["dp"] > 1) | (columns["zero"] == min(space.zero)))
    for rule in job.rules:
        keep = keep & rule.mask(columns)
    for name in ("dp", "micro_batch"):
        allowed = getattr(space, name)
        if allowed is not None:
            keep = keep & np.isin(columns[name], allowed)
    return keep
