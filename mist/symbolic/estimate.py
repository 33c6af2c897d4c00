"""Any concrete layout -> Estimate, by the stage cost and the step time that the search uses."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mist.errors import PlatformError
from mist.plans.plan import (
    Estimate,
    Layout,
    PricedStages,
    StageEstimate,
    TimePart,
    Uncertainty,
)
from mist.platform import OpCosts, Quantity, extrapolations, op_costs
from mist.platform.calibration import figure_at, with_values
from mist.platform.step_interval import step_interval
from mist.symbolic.job import Job, on_profiles
from mist.symbolic.pipeline_costs import pipeline_step_s, stage_outputs
from mist.symbolic.program import MEMORY_PARTS, TIME_PARTS, stage_model
from mist.units import LARGEST_INTEGER, six_digits

SHORTEST_S: Final = 1e-9
LONGEST_S: Final = 1e15  # of a step; a year has 3e7

NOT_MODELLED = (
    "data loading, checkpoint writing, evaluation and restarts",
    "stragglers, clock throttling and network contention from other jobs",
    "gradient clipping and the learning-rate schedule",
    "allocator fragmentation beyond the stated share",
)


def estimate(job: Job, layout: Layout) -> Estimate:
    """Predict one step of a layout.

    Args:
        job: model, platform and workload.
        layout: its stages in order, G micro-batches per step, and their schedule.

    Raises PlatformError where figures of the profiles give no time or memory at all.
    """

    def priced(laws: OpCosts) -> Mapping[str, NDArray[np.float64]]:
        other = replace(job, cost=stage_model(job.programs, laws))
        return stage_outputs(other, layout)

    step_s, columns = _priced(job, layout)
    stable_s, lone_s = columns["stable_s"], columns["lone_s"]
    slowest = int(stable_s.argmax())
    busy_s = (layout.num_micro_batches - 1) * stable_s[slowest] + lone_s[slowest]
    flop_per_s = (
        job.platform.num_gpus
        * job.platform.device.gemm[job.workload.precision].peak_flop_per_s.value
    )
    low, high = _step_interval(job, layout)
    return Estimate(
        step_s=_digits(step_s),
        tokens_per_s=_digits(job.workload.tokens_per_step / step_s),
        mfu=_digits(model_flop(job) / step_s / flop_per_s),
        bubble_s=_digits(max(step_s - busy_s, 0.0)),
        stages=_stages(job, columns),
        uncertainty=Uncertainty(
            step_low_ratio=_digits(low),
            step_high_ratio=_digits(high),
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


def priced_stages(job: Job, layout: Layout) -> PricedStages:
    """What of `estimate` layouts are compared by. Raises PlatformError as it does."""
    step_s, columns = _priced(job, layout)
    return PricedStages(step_s=_digits(step_s), stages=_stages(job, columns))


def step_at(job: Job, layout: Layout, figures: Mapping[str, Quantity]) -> float:
    """Seconds of a step where some figures are others, by path as in a calibration.

    Raises PlatformError for one that the profiles do not have, and as `estimate` does.
    """
    other = on_profiles(job, with_values(job.platform.profiles, figures))
    return _priced(other, layout)[0]


def _priced(job: Job, layout: Layout) -> tuple[float, dict[str, NDArray[np.float64]]]:
    """Seconds of a step, and the outputs of the stage formulas, [S] each."""
    columns = stage_outputs(job, layout)
    step_s = pipeline_step_s(layout, columns)
    _refuse_absurd(job, columns, step_s)
    return step_s, columns


def _step_interval(job: Job, layout: Layout) -> tuple[float, float]:
    """Ends of the measured over the predicted step; what the user set is sure."""
    platform = job.platform
    known = platform.calibration.values if platform.calibration else {}
    figures = {
        path: figure_at(platform.profiles, path) for path in known if path not in platform.overrides
    }

    def log_steps(moved: Mapping[str, Quantity]) -> NDArray[np.float64]:
        return np.log([step_at(job, layout, moved)])

    (low,), (high,) = step_interval(platform.step_error, figures, log_steps)
    return float(low), float(high)


def _refuse_absurd(job: Job, columns: Mapping[str, NDArray[np.float64]], step_s: float) -> None:
    """Raise PlatformError for numbers that no machine gives: comparing NaN says "fits"."""
    finite = all(np.isfinite(values).all() for values in columns.values())
    if not (finite and SHORTEST_S <= step_s <= LONGEST_S) or (
        max(columns["peak_bytes"].max(), columns["host_bytes"].max()) > LARGEST_INTEGER
    ):
        names = ", ".join(job.platform.profile_hashes())
        raise PlatformError(
            f"a step of {job.facts.name} is predicted to take {step_s:.3g} s and "
            f"{columns['peak_bytes'].max():.3g} bytes, which cannot be. Look at the figures of "
            f"{names} (mist profiles show NAME), and at the sizes asked for."
        )


def model_flop(job: Job) -> float:
    """Model FLOPs of one step, nothing recomputed."""
    flop = job.cost.flop({"b": 1, "s": job.workload.seq_len, "t": 1})
    layers = sum(float(flop[str(kind)]) for kind in job.facts.layer_kinds())
    ends = float(flop["embed"] + flop["head"])
    return job.workload.global_batch * (layers + ends)


def _stages(job: Job, columns: Mapping[str, NDArray[np.float64]]) -> tuple[StageEstimate, ...]:
    return tuple(_stage_estimate(job, columns, i) for i in range(len(columns["stable_s"])))


def _stage_estimate(job: Job, columns: Mapping[str, NDArray[np.float64]], i: int) -> StageEstimate:
    stable_s, lone_s = columns["stable_s"][i], columns["lone_s"][i]
    return StageEstimate(
        stable_s=_digits(stable_s),
        delta_s=_digits(lone_s - stable_s),
        time_parts_s={part: _digits(s) for part, s in _time_parts(columns, i).items()},
        peak_bytes=round(columns["peak_bytes"][i]),
        usable_bytes=int(job.platform.usable_bytes),
        memory_parts_bytes={part: round(columns[f"{part}_bytes"][i]) for part in MEMORY_PARTS},
        host_bytes=round(columns["host_bytes"][i]),
    )


def _time_parts(columns: Mapping[str, NDArray[np.float64]], i: int) -> dict[TimePart, np.float64]:
    """Seconds of a stage by part.

    Converted layers may take less time than plain ones, whatever they run again: that is no
    negative recomputation, but less to compute.
    """
    parts = {part: columns[f"{part}_s"][i] for part in TIME_PARTS}
    saved_s = np.minimum(parts["recompute"], 0.0)
    parts["compute"] += saved_s
    parts["recompute"] -= saved_s
    return parts


def _digits(value: float) -> float:
    """Six significant digits: all that a prediction can mean, and stable bytes in the plan file.

    What is below a picosecond is what rounding leaves of sums that cancel, on each CPU another.
    """
    return six_digits(round(value, 12) + 0.0)
