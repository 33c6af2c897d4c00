"""From a layout to the inputs of compiled programs: columns, one value per strategy or stage.

Three sets of columns meet in a stage's formulas (`symbols.py` says what each means):

*strategy*  b, s, t, data-parallel groups and how many of their ranks share a node, ZeRO level,
            offload ratios: inputs of the terms
*position*  which stage it is, what it has in flight, whether its edges leave the node
*layers*    how many of each kind, at each memory level
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mist.plans.plan import DEFAULT_SCHEDULE, Offload, Schedule, StagePlan
from mist.plans.schedules import held, zero_as_run
from mist.plans.workload import MemoryLevel
from mist.symbolic.job import Job

NO_OFFLOAD: Final = MappingProxyType({item.name: 0.0 for item in fields(Offload)})

Counts = NDArray[np.int64]


def strategy_columns(  # noqa: PLR0913 - a strategy's columns
    job: Job,
    *,
    num_stages: int,
    dp: ArrayLike,
    tp: ArrayLike,
    micro_batch: ArrayLike,
    zero: ArrayLike,
    offload: Mapping[str, ArrayLike] = NO_OFFLOAD,
    dp_replicate: ArrayLike = 1,
    schedule: Schedule = DEFAULT_SCHEDULE,
) -> dict[str, ArrayLike]:
    """Inputs of the terms of a job; `offload`: the ratio of each state in host memory."""
    return rank_columns(
        pipelined=int(num_stages > 1 and job.platform.num_nodes > 1),
        seq_len=job.workload.seq_len,
        gpus_per_node=job.platform.gpus_per_node,
        dp=dp,
        tp=tp,
        micro_batch=micro_batch,
        zero=zero_as_run(schedule.kind, zero),
        offload=offload,
        dp_replicate=dp_replicate,
    )


def rank_columns(  # noqa: PLR0913 - a strategy's columns
    *,
    pipelined: ArrayLike,
    seq_len: ArrayLike,
    gpus_per_node: ArrayLike,
    dp: ArrayLike,
    tp: ArrayLike,
    micro_batch: ArrayLike,
    zero: ArrayLike,
    offload: Mapping[str, ArrayLike] = NO_OFFLOAD,
    dp_replicate: ArrayLike = 1,
) -> dict[str, ArrayLike]:
    """Inputs of the terms. tp is innermost: ranks that share states are tp apart, copies further.

    At ZeRO-0 every data-parallel rank has a copy of the states.
    """
    per_node = np.maximum(np.asarray(gpus_per_node) // np.asarray(tp), 1)
    shard = np.where(np.asarray(zero) > 0, np.asarray(dp) // np.asarray(dp_replicate), 1)
    copies = np.asarray(dp) // shard
    return {
        "b": micro_batch,
        "s": seq_len,
        "t": tp,
        "dp_shard": shard,
        "dp_shard_per_node": np.minimum(shard, per_node),
        "copies": copies,
        "copies_per_node": np.minimum(copies, np.maximum(per_node // shard, 1)),
        "zero": zero,
        "tp_per_node": np.minimum(tp, gpus_per_node),
        "pipelined": pipelined,
        **{f"offload_{name}": ratio for name, ratio in offload.items()},
    }


def position_columns(
    job: Job,
    devices: NDArray[np.int64],
    layers: ArrayLike,
    num_micro_batches: int,
    schedule: Schedule = DEFAULT_SCHEDULE,
) -> dict[str, ArrayLike]:
    """Position of a job's stages, in order, from their [first, count] devices: shape [S].

    `layers`: how many each stage has.
    """
    num_stages = len(devices)
    return (
        held(schedule.kind, layers=layers, **pipeline_of(schedule, num_stages, num_micro_batches))
        | stage_columns(
            stage=np.arange(num_stages),
            num_stages=np.full(num_stages, num_stages),
            first_device=devices[:, 0],
            num_devices=devices[:, 1],
            gpus_per_node=np.full(num_stages, job.platform.gpus_per_node),
            spans_nodes=np.full(num_stages, job.platform.num_nodes > 1),
        )
        | {
            "chunks": np.full(num_stages, schedule.vpp),
            "num_micro_batches": np.full(num_stages, num_micro_batches),
        }
    )


def pipeline_of(
    schedule: Schedule, num_stages: int, num_micro_batches: int
) -> dict[str, ArrayLike]:
    """What `mist.plans.schedules` asks of a pipeline, for all of its stages."""
    return {
        "stage": np.arange(num_stages),
        "num_stages": num_stages,
        "num_micro_batches": num_micro_batches,
        "chunks": schedule.vpp,
    }


def stage_columns(  # noqa: PLR0913 - what says where a stage is
    *,
    stage: Counts,
    num_stages: Counts,
    first_device: Counts,
    num_devices: Counts,
    gpus_per_node: Counts,
    spans_nodes: NDArray[np.bool_],
) -> dict[str, ArrayLike]:
    """Where stages are, of one pipeline or of many: shape [any], each stage with its own.

    The last stage's next is the first, where chunks take turns.
    """
    is_first, is_last = stage == 0, stage == num_stages - 1
    starts_node = first_device % gpus_per_node == 0
    ends_node = (first_device + num_devices) % gpus_per_node == 0
    return {
        "is_first": is_first.astype(int),
        "is_last": is_last.astype(int),
        "prev_crosses_node": np.where(is_first, spans_nodes, starts_node).astype(int),
        "next_crosses_node": np.where(is_last, spans_nodes, ends_node).astype(int),
        "spans_nodes": spans_nodes.astype(int),
    }


def count_columns(job: Job, first: ArrayLike, counts: Sequence[ArrayLike]) -> dict[str, Counts]:
    """Layers by kind and level from `first` on; `counts`: layers at each level, in their order.

    Those at the last level come first.
    """
    start = np.asarray(first)
    columns = {}
    # The layers that keep least come first in a stage (decision 11): memory is then convex.
    for level, count in reversed([*zip(MemoryLevel, counts, strict=True)]):
        stop = start + np.asarray(count)
        for kind, prefix in enumerate(job.kind_prefix):
            columns[f"{level}_{kind}"] = prefix[stop] - prefix[start]
        start = stop
    return columns


def layer_columns(job: Job, stages: Sequence[StagePlan]) -> dict[str, Counts]:
    """Layers of each stage by kind and level, over all its runs; shape [S]."""
    kinds = job.facts.layer_kinds()
    columns = {
        f"{level}_{kind}": np.zeros(len(stages), dtype=np.int64)
        for level in MemoryLevel
        for kind in range(job.facts.num_kinds)
    }
    for i, stage in enumerate(stages):
        layers = (layer for first, count in stage.layers for layer in range(first, first + count))
        for layer, level in zip(layers, stage.levels, strict=True):
            columns[f"{level}_{kinds[layer]}"][i] += 1
    return columns
