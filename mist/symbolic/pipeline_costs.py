"""From a layout to what each of its stages costs: outputs of the stage formulas, each of shape [S].

The step time that follows from them is `mist.plans.schedules.step_time`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mist.plans.plan import Layout
from mist.symbolic.columns import layout_inputs
from mist.symbolic.job import Job
from mist.symbolic.program import TIME_PARTS


def stage_outputs(job: Job, layout: Layout) -> dict[str, NDArray[np.float64]]:
    """Every output of the stage formulas, each of shape [S]."""
    strategy, position = layout_inputs(job.placement, job.facts.layer_kinds(), layout)
    terms = job.cost.terms(strategy)
    columns = job.cost.stage({**terms, **position})
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
