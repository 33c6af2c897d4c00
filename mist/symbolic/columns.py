"""From a layout to the inputs of compiled programs: columns, one value per strategy or stage.

Three sets of columns meet in a stage's formulas (`symbols.py` says what each means):

*strategy*  b, s, t, data-parallel groups and how many of their ranks share a node, ZeRO level,
            offload ratios: inputs of the terms
*position*  which stage it is, what it has in flight, whether its edges leave the node
*layers*    how many of each kind, at each memory level
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mist.plans.knobs import AT_REST
from mist.plans.plan import DEFAULT_SCHEDULE, Layout, Offload, Schedule, StagePlan
from mist.plans.schedules import held, zero_as_run
from mist.plans.workload import MemoryLevel

NO_OFFLOAD: Final = MappingProxyType({item.name: 0.0 for item in fields(Offload)})

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What all stages of a job share. `spans_nodes`: whether it has more than one node."""

    seq_len: int
    gpus_per_node: int
    spans_nodes: bool


def layout_inputs(
    placement: Placement, kinds: Sequence[int], layout: Layout
) -> tuple[dict[str, ArrayLike], dict[str, ArrayLike]]:
    """Inputs of the terms of a layout, and those of the stage formulas behind them: [S] each.

    `kinds`: which block each layer of the model is.
    """
    stages, schedule = layout.stages, layout.schedule
    rows = [stage.columns for stage in stages]
    knobs = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    strategy = strategy_columns(placement, knobs, num_stages=len(stages), schedule=schedule)
    devices = np.array([stage.devices for stage in stages])
    layers = np.array([stage.num_layers for stage in stages])
    position = position_columns(placement, devices, layers, layout.num_micro_batches, schedule)
    return strategy, {**position, **layer_columns(kinds, stages)}


def strategy_columns(
    placement: Placement,
    knobs: Mapping[str, ArrayLike],
    *,
    num_stages: int,
    schedule: Schedule = DEFAULT_SCHEDULE,
) -> dict[str, ArrayLike]:
    """Inputs of the terms. tp is innermost: ranks that share states are tp apart, copies further.

    `knobs`: of strategies by name, and the ratio of each state in host memory; what is left out is
    at rest. At ZeRO-0 every data-parallel rank has a copy of the states.

    cp ranks have b / cp of whole samples each: as many tokens, and pairs of tokens in attention, as
    shares of the sequence that are dealt evenly. States are divided over dp * cp ranks. That keys
    and values travel is not counted: they hide behind attention where sequences are long.
    """
    rest: dict[str, ArrayLike] = {**AT_REST, **NO_OFFLOAD, **knobs}
    values = {name: np.asarray(value) for name, value in rest.items()}
    tp, dp = values["tp"], values["dp"] * values["cp"]
    zero = zero_as_run(schedule.kind, values["zero"])
    per_node = np.maximum(placement.gpus_per_node // tp, 1)
    shard = np.where(zero > 0, dp // values["dp_replicate"], 1)
    copies = dp // shard
    return {
        "b": values["micro_batch"] / values["cp"],
        "s": placement.seq_len,
        "t": tp,
        "dp_shard": shard,
        "dp_shard_per_node": np.minimum(shard, per_node),
        "copies": copies,
        "copies_per_node": np.minimum(copies, np.maximum(per_node // shard, 1)),
        "zero": zero,
        "head": values["head"],
        "tp_per_node": np.minimum(tp, placement.gpus_per_node),
        "pipelined": int(num_stages > 1 and placement.spans_nodes),
        **{f"offload_{name}": values[name] for name in NO_OFFLOAD},
    }


def position_columns(
    placement: Placement,
    devices: NDArray[np.int64],
    layers: ArrayLike,
    num_micro_batches: int,
    schedule: Schedule = DEFAULT_SCHEDULE,
) -> dict[str, ArrayLike]:
    """Position of the stages of a pipeline, in order, from their [first, count] devices: shape [S].

    `layers`: how many each stage has.
    """
    num_stages = len(devices)
    stage, first_device = np.arange(num_stages), devices[:, 0]
    is_first, is_last = stage == 0, stage == num_stages - 1
    starts_node = first_device % placement.gpus_per_node == 0
    ends_node = (first_device + devices[:, 1]) % placement.gpus_per_node == 0
    # The last stage's next is the first, where chunks take turns.
    prev_crosses = np.where(is_first, placement.spans_nodes, starts_node)
    next_crosses = np.where(is_last, placement.spans_nodes, ends_node)
    pipeline = pipeline_of(schedule, num_stages, num_micro_batches)
    return {
        **held(schedule.kind, layers=layers, **pipeline),
        "is_first": is_first.astype(int),
        "is_last": is_last.astype(int),
        "prev_crosses_node": prev_crosses.astype(int),
        "next_crosses_node": next_crosses.astype(int),
        "spans_nodes": np.full(num_stages, int(placement.spans_nodes)),
        "chunks": np.full(num_stages, schedule.vpp),
        "num_micro_batches": np.full(num_stages, num_micro_batches),
    }


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


def layer_columns(kinds: Sequence[int], stages: Sequence[StagePlan]) -> dict[str, Counts]:
    """Layers of each stage by kind and level, over all its runs; shape [S]."""
    columns = {
        f"{level.column}_{kind}": np.zeros(len(stages), dtype=np.int64)
        for level in MemoryLevel
        for kind in set(kinds)
    }
    for i, stage in enumerate(stages):
        layers = (layer for first, count in stage.layers for layer in range(first, first + count))
        for layer, level in zip(layers, stage.levels, strict=True):
            columns[f"{level.column}_{kinds[layer]}"][i] += 1
    return columns
