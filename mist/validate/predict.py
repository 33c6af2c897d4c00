"""Predictions of many runs at once: those of one model, platform and precision in one go."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mist.plans.schedules import fill_time, held, step_time
from mist.plans.workload import MemoryLevel, Precision, ScheduleKind
from mist.platform import Cluster, Device, OpCosts, Runtime
from mist.symbolic.columns import rank_columns, stage_columns
from mist.symbolic.program import ModelPrograms, StageModel, stage_model
from mist.validate.run_layouts import RunLayout

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProfiles:
    """The profiles that runs are predicted on."""

    device: Device
    cluster: Cluster
    runtime: Runtime
    precision: Precision
    fp8: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A run ready to be predicted."""

    layout: RunLayout
    seq_len: int
    num_gpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One run: seconds of a step, and bytes of the fullest stage.

    `reserved_bytes`: with the allocator's share; `stage_bytes`: allocated, of every stage.
    """

    step_s: float
    allocated_bytes: float
    reserved_bytes: float
    stage_bytes: tuple[float, ...]


def predict(
    programs: ModelPrograms, machine: RunProfiles, cases: Sequence[Case]
) -> tuple[Prediction, ...]:
    """Predict runs of one model on one machine."""
    cost = stage_model(
        programs,
        OpCosts(
            device=machine.device,
            cluster=machine.cluster,
            runtime=machine.runtime,
            precision=machine.precision,
            fp8=machine.fp8,
        ),
    )
    stages = np.array([case.layout.num_stages for case in cases])
    run = np.repeat(np.arange(len(cases)), stages)
    out = _stages(cost, machine, cases, run)
    padded = {name: _padded(out[name], run, stages) for name in ("stable_s", "lone_s")}
    counts = np.array([case.layout.num_micro_batches for case in cases])
    chunks = np.array([[case.layout.chunks] for case in cases])
    fill_s = fill_time(padded["stable_s"], chunks=chunks)
    step_s = step_time(counts, padded["stable_s"], padded["lone_s"], fill_s)
    allocated = out["peak_bytes"] - out["allocator_bytes"]
    ends = np.cumsum(stages)
    return tuple(
        Prediction(
            step_s=float(step_s[i]),
            allocated_bytes=float(allocated[end - n : end].max()),
            reserved_bytes=float(out["peak_bytes"][end - n : end].max()),
            stage_bytes=tuple(allocated[end - n : end].tolist()),
        )
        for i, (n, end) in enumerate(zip(stages, ends, strict=True))
    )


def _stages(
    cost: StageModel, machine: RunProfiles, cases: Sequence[Case], run: NDArray[np.int64]
) -> dict[str, Floats]:
    """Every output of the stage formulas for every stage of every run; `run`: whose it is."""
    layouts = [case.layout for case in cases]

    def column(name: str) -> NDArray[np.int64]:
        return np.array([getattr(layout, name) for layout in layouts])

    gpus = np.array([case.num_gpus for case in cases])
    per_node = np.minimum(gpus, machine.cluster.num_gpus_per_node)
    strategy = rank_columns(
        pipelined=((column("num_stages") > 1) & (gpus > per_node)).astype(int),
        seq_len=np.array([case.seq_len for case in cases]),
        gpus_per_node=per_node,
        dp=column("dp"),
        tp=column("tp"),
        micro_batch=column("micro_batch"),
        zero=column("zero"),
    )
    terms = cost.terms(strategy)
    terms = {name: value[run] for name, value in terms.items()}
    stage = np.concatenate([np.arange(layout.num_stages) for layout in layouts])
    ranks = column("dp") * column("tp")
    position = stage_columns(
        stage=stage,
        num_stages=column("num_stages")[run],
        first_device=stage * ranks[run],
        num_devices=ranks[run],
        gpus_per_node=per_node[run],
        spans_nodes=(gpus > per_node)[run],
    )
    micro, chunks = column("num_micro_batches")[run], column("chunks")[run]
    levels = {
        f"{level}_0": np.array([stage[level] for layout in layouts for stage in layout.memory])
        for level in MemoryLevel
    }
    pipelines = {"stage": stage, "num_stages": column("num_stages")[run]}
    steps = {"num_micro_batches": micro, "chunks": chunks}
    holds = _held(np.sum([*levels.values()], axis=0), **pipelines, **steps)
    return cost.stage({**terms, **position, **holds, **steps, **levels})


def _held(layers: Counts, **pipelines: Counts) -> dict[str, Floats]:
    """What stages hold at once: runs of several chunks interleave, the others are 1F1B."""
    one = held(ScheduleKind.ONE_F_ONE_B, layers=layers, **pipelines)
    many = held(ScheduleKind.INTERLEAVED, layers=layers, **pipelines)
    return {name: np.where(pipelines["chunks"] > 1, many[name], one[name]) for name in one}


def _padded(values: Floats, run: NDArray[np.int64], stages: NDArray[np.int64]) -> Floats:
    """One row for each run, zeros behind its last stage."""
    # A stage of zeros changes neither the slowest stage nor a sum: one array holds pipelines of
    # all lengths.
    wide = np.zeros((len(stages), stages.max()))
    first = np.cumsum(stages) - stages
    wide[run, np.arange(len(values)) - first[run]] = values
    return wide
