"""Any concrete layout -> Estimate, by the stage cost and the step time that the search uses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mist.model.summary import ModelFacts
from mist.plans.plan import (
    ONE_F_ONE_B,
    Estimate,
    Offload,
    Schedule,
    StageEstimate,
    StagePlan,
    Uncertainty,
)
from mist.plans.schedules import held, step_time, zero_as_run
from mist.plans.workload import MemoryLevel, ScheduleKind, Workload
from mist.platform import OpCosts, Platform, extrapolations, op_costs
from mist.rules.combinations import rules_for
from mist.rules.rule import Rule
from mist.symbolic.program import (
    MEMORY_PARTS,
    TIME_PARTS,
    ModelPrograms,
    StageModel,
    stage_model,
)

NOT_MODELLED = (
    "data loading, checkpoint writing, evaluation and restarts",
    "stragglers, clock throttling and network contention from other jobs",
    "gradient clipping and the learning-rate schedule",
    "allocator fragmentation beyond the stated share",
)

NO_OFFLOAD: Final = MappingProxyType({item.name: 0.0 for item in fields(Offload)})

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A model on a platform under a workload, with its stage cost bound and its rules.

    `cost` are the `programs` bound to the `laws`. `kind_prefix[k, x]`: how many of the first x
    layers are block k.
    """

    facts: ModelFacts
    programs: ModelPrograms
    laws: OpCosts
    platform: Platform
    workload: Workload
    cost: StageModel
    rules: tuple[Rule, ...]
    kind_prefix: Counts

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.facts.num_layers


def make_job(programs: ModelPrograms, platform: Platform, workload: Workload) -> Job:
    """Bind the programs of a model to a platform, for a workload."""
    facts = programs.facts
    is_kind = np.array(facts.layer_kinds()) == np.arange(facts.num_kinds)[:, None]
    laws = OpCosts(
        device=platform.device,
        cluster=platform.cluster,
        runtime=platform.runtime,
        precision=workload.precision,
    )
    cost = stage_model(programs, laws)
    return Job(
        facts=facts,
        programs=programs,
        laws=laws,
        platform=platform,
        workload=workload,
        cost=cost,
        rules=rules_for(facts, platform, workload, cost.domain),
        kind_prefix=np.pad(is_kind.cumsum(axis=1), ((0, 0), (1, 0))),
    )


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
    schedule: Schedule = ONE_F_ONE_B,
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
    schedule: Schedule = ONE_F_ONE_B,
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
    for level, count in reversed([*zip(MemoryLevel, counts, strict=True)]):
        stop = start + np.asarray(count)
        for kind, prefix in enumerate(job.kind_prefix):
            columns[f"{level}_{kind}"] = prefix[stop] - prefix[start]
        start = stop
    return columns


def estimate(
    job: Job,
    stages: Sequence[StagePlan],
    num_micro_batches: int,
    schedule: Schedule = ONE_F_ONE_B,
) -> Estimate:
    """Predict one step of a layout.

    Args:
        job: model, platform and workload.
        stages: the pipeline stages in order.
        num_micro_batches: G, micro-batches per step.
        schedule: the order of micro-batches.
    """

    def priced(laws: OpCosts) -> Mapping[str, NDArray[np.float64]]:
        other = replace(job, cost=stage_model(job.programs, laws))
        return _stage_columns(other, stages, num_micro_batches, schedule)

    columns = _stage_columns(job, stages, num_micro_batches, schedule)
    stable_s, lone_s = columns["stable_s"], columns["lone_s"]
    fill_s = fill_seconds(schedule, stable_s, columns["weight_s"])
    step_s = float(step_time(num_micro_batches, stable_s, lone_s, fill_s))
    slowest = int(stable_s.argmax())
    busy_s = (num_micro_batches - 1) * stable_s[slowest] + lone_s[slowest]
    flop_per_s = job.platform.num_gpus * _peak_flop_per_s(job)
    return Estimate(
        step_s=_digits(step_s),
        tokens_per_s=_digits(job.workload.tokens_per_step / step_s),
        mfu=_digits(model_flop(job) / step_s / flop_per_s),
        bubble_s=_digits(max(step_s - busy_s, 0.0)),
        stages=tuple(_stage_estimate(job, columns, i) for i in range(len(stages))),
        uncertainty=Uncertainty(
            step_ratio=job.platform.step_uncertainty_ratio,
            memory_ratio=job.platform.memory_uncertainty_ratio,
            calibrated=job.platform.calibration is not None,
            basis=job.platform.uncertainty_basis,
        ),
        op_costs=op_costs(
            job.laws, num_gpus=job.platform.num_gpus, num_nodes=job.platform.num_nodes
        ),
        extrapolated=extrapolations(job.laws, priced),
        not_modelled=NOT_MODELLED,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Seconds of each stage, all [S]: a micro-step by part, the delta, and gradients of weights."""

    parts_s: Mapping[str, NDArray[np.float64]]
    delta_s: NDArray[np.float64]
    weight_s: NDArray[np.float64]


def stage_times(
    job: Job, stages: Sequence[StagePlan], num_micro_batches: int, schedule: Schedule
) -> StageTimes:
    """The numbers behind `estimate`, not rounded: what a step is computed from."""
    columns = _stage_columns(job, stages, num_micro_batches, schedule)
    return StageTimes(
        parts_s={part: columns[f"{part}_s"] for part in TIME_PARTS},
        delta_s=columns["lone_s"] - columns["stable_s"],
        weight_s=columns["weight_s"],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingBytes:
    """Host bytes of one rank of each stage, [S]: the module that it draws, and all at that time."""

    drawn_bytes: NDArray[np.float64]
    held_bytes: NDArray[np.float64]


def loading(
    job: Job, stages: Sequence[StagePlan], num_micro_batches: int, schedule: Schedule
) -> LoadingBytes | None:
    """Host memory while weights are drawn; None where the runtime's way is not known.

    Weights and moments are there already, gradients and activations not yet.
    """
    if job.platform.runtime.loading is None:
        return None
    begun = [replace(s, offload=replace(s.offload, grads=0.0, activations=0.0)) for s in stages]
    columns = _stage_columns(job, begun, num_micro_batches, schedule)
    drawn_bytes = columns["drawn_bytes"]
    return LoadingBytes(drawn_bytes=drawn_bytes, held_bytes=columns["host_bytes"] + drawn_bytes)


def model_flop(job: Job) -> float:
    """Model FLOPs of one step, nothing recomputed."""
    flop = job.cost.flop({"b": 1, "s": job.workload.seq_len, "t": 1})
    layers = sum(float(flop[str(kind)]) for kind in job.facts.layer_kinds())
    ends = float(flop["embed"] + flop["head"])
    return job.workload.global_batch * (layers + ends)


def _peak_flop_per_s(job: Job) -> float:
    return job.platform.device.gemm[job.workload.precision].peak_flop_per_s.value


def fill_seconds(
    schedule: Schedule, stable_s: NDArray[np.float64], weight_s: NDArray[np.float64]
) -> NDArray[np.float64]:
    """What each stage adds to filling and draining the pipeline, in s; same shape.

    A chunk is 1/v of a stage (Narayanan et al. 2021, section 2.2). Under zero bubble (ZB-H1, Qi et
    al. 2024) weight gradients wait, and fill the bubble once of another micro-batch: 2 w less.
    """
    spared = 2 * weight_s if schedule.kind is ScheduleKind.ZERO_BUBBLE else 0.0
    return np.asarray(np.maximum(stable_s - spared, 0.0) / schedule.vpp)


def _stage_columns(
    job: Job, stages: Sequence[StagePlan], num_micro_batches: int, schedule: Schedule
) -> dict[str, NDArray[np.float64]]:
    """Every output of the stage formulas, each of shape [S]."""
    strategy = strategy_columns(
        job,
        num_stages=len(stages),
        dp=[stage.dp for stage in stages],
        tp=[stage.tp for stage in stages],
        micro_batch=[stage.micro_batch for stage in stages],
        zero=[stage.zero for stage in stages],
        dp_replicate=[stage.dp_replicate for stage in stages],
        offload={name: [getattr(s.offload, name) for s in stages] for name in NO_OFFLOAD},
        schedule=schedule,
    )
    terms = job.cost.terms(strategy)
    devices = np.array([stage.devices for stage in stages])
    layers = np.array([len(stage.levels) for stage in stages])
    position = position_columns(job, devices, layers, num_micro_batches, schedule)
    columns = job.cost.stage({**terms, **position, **_layer_counts(job, stages)})
    between = resharding_seconds(terms, np.asarray(position["next_crosses_node"])[:-1])
    parts = ("p2p_s", "stable_s", "lone_s")
    return columns | {name: columns[name] + between for name in parts}


def resharding_seconds(
    terms: Mapping[str, NDArray[np.float64]], crosses: NDArray[np.int64]
) -> NDArray[np.float64]:
    """What transfers between unlike neighbours add to stages that send less themselves, in s [S].

    A rank of either side moves the activation of its own micro-batch. The side with more of it sets
    the pace of both; the stage formulas count each stage's own. `terms` [S]; `crosses` [S - 1]:
    whether the edge behind a stage leaves the node.
    """
    in_node_s, cross_s = terms["term_p2p_in_node_s"], terms["term_p2p_cross_s"]
    left_s, right_s = (
        np.where(crosses, cross_s[side], in_node_s[side])
        for side in (slice(None, -1), slice(1, None))
    )
    added_s = np.zeros(len(in_node_s))
    added_s[:-1] += np.maximum(right_s - left_s, 0.0)
    added_s[1:] += np.maximum(left_s - right_s, 0.0)
    return added_s


def _layer_counts(job: Job, stages: Sequence[StagePlan]) -> dict[str, Counts]:
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


def _stage_estimate(job: Job, columns: dict[str, NDArray[np.float64]], i: int) -> StageEstimate:
    stable_s, lone_s = columns["stable_s"][i], columns["lone_s"][i]
    return StageEstimate(
        stable_s=_digits(stable_s),
        delta_s=_digits(lone_s - stable_s),
        time_parts_s={part: _digits(columns[f"{part}_s"][i]) for part in TIME_PARTS},
        peak_bytes=round(columns["peak_bytes"][i]),
        usable_bytes=int(job.platform.usable_bytes),
        memory_parts_bytes={part: round(columns[f"{part}_bytes"][i]) for part in MEMORY_PARTS},
        host_bytes=round(columns["host_bytes"][i]),
    )


def _digits(value: float) -> float:
    """Six significant digits: all that a prediction can mean, and stable bytes in the plan file.

    What is below a picosecond is what rounding leaves of sums that cancel, on each CPU another.
    """
    return float(f"{round(value, 12) + 0.0:.6g}")
