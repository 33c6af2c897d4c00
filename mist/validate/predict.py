"""Predictions of many runs at once: those of one model, platform and precision in one go."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mist.plans.numerics import Numerics
from mist.plans.plan import Layout
from mist.plans.schedules import fill_time, step_time
from mist.platform import Cluster, Device, OpCosts, Runtime
from mist.symbolic.columns import Placement, layout_inputs
from mist.symbolic.program import ModelPrograms, StageModel, stage_model

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProfiles:
    """The profiles that runs are predicted on."""

    device: Device
    cluster: Cluster
    runtime: Runtime
    numerics: Numerics


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A run ready to be predicted."""

    layout: Layout
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
            numerics=machine.numerics,
        ),
    )
    stages = np.array([len(case.layout.stages) for case in cases])
    run = np.repeat(np.arange(len(cases)), stages)
    out = _stages(cost, machine.cluster, cases, programs.facts.layer_kinds())
    padded = {name: _padded(out[name], run, stages) for name in ("stable_s", "lone_s")}
    counts = np.array([case.layout.num_micro_batches for case in cases])
    chunks = np.array([[case.layout.schedule.vpp] for case in cases])
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
    cost: StageModel, cluster: Cluster, cases: Sequence[Case], traced: Sequence[int]
) -> dict[str, Floats]:
    """Every output of the stage formulas for every stage of every run, one run behind another.

    `traced`: of which kind each layer of the traced model is. All behind them are as the last one:
    with adapters the first layer alone has an input that needs no gradient.
    """
    inputs = [
        layout_inputs(_placement(cluster, case), _kinds(traced, case.layout), case.layout)
        for case in cases
    ]
    strategies, positions = zip(*inputs, strict=True)
    sizes = [len(case.layout.stages) for case in cases]
    terms = cost.terms(_one_behind_another(strategies, sizes))
    return cost.stage({**terms, **_one_behind_another(positions, sizes)})


def _kinds(traced: Sequence[int], layout: Layout) -> list[int]:
    num_layers = sum(stage.num_layers for stage in layout.stages)
    return [*traced, *[traced[-1]] * (num_layers - len(traced))][:num_layers]


def _placement(cluster: Cluster, case: Case) -> Placement:
    per_node = min(case.num_gpus, cluster.num_gpus_per_node)
    return Placement(
        seq_len=case.seq_len, gpus_per_node=per_node, spans_nodes=case.num_gpus > per_node
    )


def _one_behind_another(
    runs: Sequence[Mapping[str, ArrayLike]], sizes: Sequence[int]
) -> dict[str, Floats]:
    """Columns of many pipelines from those of each; `sizes`: stages of each."""
    pairs = [*zip(runs, sizes, strict=True)]
    return {
        name: np.concatenate([np.broadcast_to(columns[name], size) for columns, size in pairs])
        for name in runs[0]
    }


def _padded(values: Floats, run: NDArray[np.int64], stages: NDArray[np.int64]) -> Floats:
    """One row for each run, zeros behind its last stage."""
    # A stage of zeros changes neither the slowest stage nor a sum: one array holds pipelines of
    # all lengths.
    wide = np.zeros((len(stages), stages.max()))
    first = np.cumsum(stages) - stages
    wide[run, np.arange(len(values)) - first[run]] = values
    return wide
