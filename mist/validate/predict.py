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
from mist.symbolic.program import ModelPrograms, stage_model

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseInputs:
    """Cases as the programs of their model take them, for any figures of their profiles.

    `strategy`, `rest` [M]: columns of the M stages of all cases, one case behind another;
    `stages` [N]: of each case; `run` [M]: the case of each of their M stages; `counts`, `chunks`
    [N]: micro-batches of a step and chunks of a stage.
    """

    strategy: Mapping[str, Floats]
    rest: Mapping[str, Floats]
    stages: Counts
    run: Counts
    counts: Counts
    chunks: Counts


def case_inputs(programs: ModelPrograms, cluster: Cluster, cases: Sequence[Case]) -> CaseInputs:
    """What `predict` asks of some cases; of the cluster only how many GPUs a node has."""
    kinds = programs.facts.layer_kinds()
    each = [
        layout_inputs(_placement(cluster, case), _kinds(kinds, case.layout), case.layout)
        for case in cases
    ]
    stages = np.array([len(case.layout.stages) for case in cases])
    strategies, rest = zip(*each, strict=True)
    return CaseInputs(
        strategy=_one_behind_another(strategies, stages.tolist()),
        rest=_one_behind_another(rest, stages.tolist()),
        stages=stages,
        run=np.repeat(np.arange(len(cases)), stages),
        counts=np.array([case.layout.num_micro_batches for case in cases]),
        chunks=np.array([case.layout.schedule.vpp for case in cases]),
    )


def predict(
    programs: ModelPrograms, machine: RunProfiles, cases: Sequence[Case]
) -> tuple[Prediction, ...]:
    """Predict runs of one model on one machine."""
    inputs = case_inputs(programs, machine.cluster, cases)
    out = _stages(programs, machine, inputs)
    allocated = out["peak_bytes"] - out["allocator_bytes"]
    ends = np.cumsum(inputs.stages)
    return tuple(
        Prediction(
            step_s=float(seconds),
            allocated_bytes=float(allocated[begin:end].max()),
            reserved_bytes=float(out["peak_bytes"][begin:end].max()),
            stage_bytes=tuple(allocated[begin:end].tolist()),
        )
        for seconds, begin, end in zip(
            _step_seconds(out, inputs), ends - inputs.stages, ends, strict=True
        )
    )


def predict_steps(programs: ModelPrograms, machine: RunProfiles, inputs: CaseInputs) -> Floats:
    """Seconds of a step of each case, and nothing else of it."""
    return _step_seconds(_stages(programs, machine, inputs), inputs)


def _step_seconds(out: Mapping[str, Floats], inputs: CaseInputs) -> Floats:
    """Seconds of a step of each case, from the outputs of all of their stages."""
    padded = {
        name: _padded(out[name], inputs.run, inputs.stages) for name in ("stable_s", "lone_s")
    }
    chunks = inputs.chunks[:, None]
    fill_s = fill_time(padded["stable_s"], chunks=chunks)
    return step_time(inputs.counts, padded["stable_s"], padded["lone_s"], fill_s)


def _stages(programs: ModelPrograms, machine: RunProfiles, inputs: CaseInputs) -> dict[str, Floats]:
    """Every output of the stage formulas for every stage of every run, one run behind another."""
    cost = stage_model(
        programs,
        OpCosts(
            device=machine.device,
            cluster=machine.cluster,
            runtime=machine.runtime,
            numerics=machine.numerics,
        ),
    )
    return cost.stage({**cost.terms(inputs.strategy), **inputs.rest})


def _kinds(traced: Sequence[int], layout: Layout) -> list[int]:
    """Of which kind each layer is; `traced`: those of the traced model.

    All behind them are as the last one: with adapters the first layer alone has an input that needs
    no gradient.
    """
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
