"""From a layout to what each of its stages costs: outputs of the stage formulas, each of shape [S].

The step time that follows from them is `mist.plans.schedules.step_time`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mist.plans.plan import Layout
from mist.plans.schedules import fill_time, spare_time, step_time
from mist.symbolic.columns import layout_inputs
from mist.symbolic.job import Job
from mist.symbolic.program import TIME_PARTS, StageModel

TRANSFERS: Final = ("term_p2p_in_node_s", "term_p2p_cross_s")

Column = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineInputs:
    """Inputs of the stage formulas for the stages of some layouts, one after the other: [N].

    `strategy`: of the terms. `rest`: where each stage is, and its layers. `ends`: where each layout
    ends, so the last is N.
    """

    strategy: Mapping[str, Column]
    rest: Mapping[str, Column]
    ends: tuple[int, ...]


def pipeline_inputs(job: Job, layouts: Sequence[Layout]) -> PipelineInputs:
    """What the formulas ask of each layout; the same on any platform of as many GPUs a node."""
    kinds = job.facts.layer_kinds()
    each = [layout_inputs(job.placement, kinds, layout) for layout in layouts]
    sizes = [len(layout.stages) for layout in layouts]
    return PipelineInputs(
        strategy=_in_a_row([strategy for strategy, _ in each], sizes),
        rest=_in_a_row([rest for _, rest in each], sizes),
        ends=tuple(np.cumsum(sizes).tolist()),
    )


def _in_a_row(each: Sequence[Mapping[str, ArrayLike]], sizes: Sequence[int]) -> dict[str, Column]:
    """The columns of all layouts, of so many stages, joined."""
    return {
        name: np.concatenate(
            [
                np.broadcast_to(np.asarray(columns[name], dtype=np.float64), size)
                for columns, size in zip(each, sizes, strict=True)
            ]
        )
        for name in each[0]
    }


def pipeline_outputs(cost: StageModel, inputs: PipelineInputs) -> list[dict[str, Column]]:
    """Every output of the stage formulas for each layout, each of shape [S]."""
    terms = cost.terms(inputs.strategy)
    columns = cost.stage({**terms, **inputs.rest})
    outputs, begin = [], 0
    for end in inputs.ends:
        own = slice(begin, end)
        begin = end
        edges = inputs.rest["next_crosses_node"][own][:-1]
        between = resharding_seconds({name: terms[name][own] for name in TRANSFERS}, edges)
        parts = {name: column[own] for name, column in columns.items()}
        outputs.append(
            parts | {name: parts[name] + between for name in ("p2p_s", "stable_s", "lone_s")}
        )
    return outputs


def stage_outputs(job: Job, layout: Layout) -> dict[str, Column]:
    """Every output of the stage formulas, each of shape [S]."""
    (outputs,) = pipeline_outputs(job.cost, pipeline_inputs(job, [layout]))
    return outputs


def pipeline_step_s(layout: Layout, outputs: Mapping[str, Column]) -> float:
    """Seconds of one step of a layout, from the outputs of its stages."""
    spare_s = spare_time(layout.schedule.kind, outputs["weight_s"])
    fill_s = fill_time(outputs["stable_s"], spare_s, chunks=layout.schedule.vpp)
    stable_s, lone_s = outputs["stable_s"], outputs["lone_s"]
    return float(step_time(layout.num_micro_batches, stable_s, lone_s, fill_s))


def resharding_seconds(
    terms: Mapping[str, NDArray[np.float64]], crosses: NDArray[np.int64] | Column
) -> NDArray[np.float64]:
    """What transfers between unlike neighbours add to stages that send less themselves, in s [S].

    A rank of either side moves the activation of its own micro-batch. The side with more of it sets
    the pace of both; the stage formulas count each stage's own. `terms` [S]; `crosses` [S - 1]:
    whether the edge behind a stage leaves the node.
    """
    in_node_s, cross_s = (terms[name] for name in TRANSFERS)
    left_s, right_s = (
        np.where(crosses, cross_s[side], in_node_s[side])
        for side in (slice(None, -1), slice(1, None))
    )
    added_s = np.zeros(len(in_node_s))
    added_s[:-1] += np.maximum(right_s - left_s, 0.0)
    added_s[1:] += np.maximum(left_s - right_s, 0.0)
    return added_s


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Seconds of each stage, all [S]: a micro-step by part, the delta, and gradients of weights."""

    parts_s: Mapping[str, NDArray[np.float64]]
    delta_s: NDArray[np.float64]
    weight_s: NDArray[np.float64]


def stage_times(job: Job, layout: Layout) -> StageTimes:
    """The numbers behind `estimate`, not rounded: what a step is computed from."""
    columns = stage_outputs(job, layout)
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


def loading(job: Job, layout: Layout) -> LoadingBytes | None:
    """Host memory while weights are drawn; None where the runtime's way is not known.

    Weights and moments are there already, gradients and activations not yet.
    """
    if job.platform.runtime.loading is None:
        return None
    begun = [
        replace(s, offload=replace(s.offload, grads=0.0, activations=0.0)) for s in layout.stages
    ]
    columns = stage_outputs(job, replace(layout, stages=begun))
    drawn_bytes = columns["drawn_bytes"]
    return LoadingBytes(drawn_bytes=drawn_bytes, held_bytes=columns["host_bytes"] + drawn_bytes)
