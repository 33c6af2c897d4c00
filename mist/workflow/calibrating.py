"""`mist calibrate`: what one's own measured runs say about the constants behind the plans."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mist.calibrate.fit import Range, fitted
from mist.calibrate.logs import read_log
from mist.errors import InputError
from mist.model.graph import ModelGraph
from mist.plans.file import load_plan
from mist.plans.plan import Plan
from mist.platform import Platform, Quantity
from mist.platform.calibration import Calibration, calibrated
from mist.symbolic.estimate import estimate
from mist.symbolic.job import make_job
from mist.symbolic.load_programs import compile_graph
from mist.trace import TraceSetting, load_graph
from mist.workflow.checking import HandLayout, plan_by_hand, question_of
from mist.workflow.plan_model import UNDER_HERE, ModelAccess, model_of
from mist.workflow.request import Question, platform_of, setting_of

# In the order in which they are fitted: as many as half of the runs, and at least one.
CONSTANTS: Final = (
    "device.tensor_time_scale",
    "runtime.host.layer_launch_s",
    "cluster.network.hop_s",
    "runtime.overlap.compute_slowdown_ratio",
)
FACTOR: Final = 4.0  # a constant ends between a quarter and four times of where it starts
LEAST_ERROR: Final = 0.05  # no fit to a few runs promises more


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRun:
    """A plan that was run, with the median of its steps."""

    plan: Plan
    platform: Platform
    setting: TraceSetting
    graph: ModelGraph
    seconds: float

    def log_error(self, values: Mapping[str, float]) -> float:
        """log(predicted / measured) with these constants."""
        held = (self.platform.device, self.platform.cluster, self.platform.runtime)
        device, cluster, runtime = _calibration(self.platform, values).applied(held)
        platform = replace(self.platform, device=device, cluster=cluster, runtime=runtime)
        # Figures of the runtime are printed into the programs: a new value needs new programs.
        programs = compile_graph(self.graph, self.setting, runtime)
        job = make_job(programs, platform, self.plan.workload)
        predicted = estimate(job, self.plan.layout).step_s
        return float(np.log(predicted / self.seconds))


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """What was fitted: constants before and after, and log errors of the runs before and after."""

    calibration: Calibration
    before: Mapping[str, float]
    after: Mapping[str, float]
    errors_before: tuple[float, ...]
    errors_after: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunByHand:
    """What was run, in the words of `mist check`: `words` as typed, and what they mean."""

    words: str
    question: Question
    layout: HandLayout

    def __str__(self) -> str:
        return self.words


def calibrate(
    pairs: Sequence[tuple[Path | RunByHand, Path]],
    progress: Callable[[str], None],
    access: ModelAccess = UNDER_HERE,
) -> Calibrated:
    """Fit constants to runs, each a plan or a layout written by hand, and its log.

    `access`: to the models of the plans. Raises InputError when plans and logs do not belong.
    """
    runs = [_measured(plan, log, progress, access) for plan, log in pairs]
    first = runs[0].platform
    for (path, _), run in zip(pairs, runs, strict=True):
        if (run.platform.runtime.name, run.platform.device.name) != _names(first):
            raise InputError(
                f"{path} is for runtime {run.platform.runtime.name} on {run.platform.device.name}, "
                f"{pairs[0][0]} for {' on '.join(_names(first))}. Calibrate each by itself."
            )
    count = max(len(runs) // 2, 1)
    known = {name: _value(first, name) for name in CONSTANTS}
    # A constant of 0 is of something that is not there: no factor changes it. The first, a time of
    # kernels, is 0 in no profile.
    before = dict(islice(((name, value) for name, value in known.items() if value), count))
    ranges = {
        name: Range(start=value, least=value / FACTOR, most=value * FACTOR)
        for name, value in before.items()
    }

    def errors_at(values: Mapping[str, float]) -> NDArray[np.float64]:
        progress(", ".join(f"{name} {value:.3g}" for name, value in values.items()))
        return np.array([run.log_error(values) for run in runs])

    errors_before = errors_at(before)
    after, errors_after = fitted(errors_at, ranges)
    return Calibrated(
        calibration=_calibration(first, after, _interval(first, errors_after, count)),
        before=before,
        after=after,
        errors_before=tuple(errors_before.tolist()),
        errors_after=tuple(errors_after.tolist()),
    )


def _measured(
    ran: Path | RunByHand, log: Path, progress: Callable[[str], None], access: ModelAccess
) -> PlanRun:
    if isinstance(ran, RunByHand):
        question = ran.question
        _, plan = plan_by_hand(question, ran.layout, progress)
        source = question.model
    else:
        plan = load_plan(ran)
        source = model_of(plan, ran, access, progress)
        question = question_of(plan, ran, source)
    tokens_per_gpu = plan.workload.tokens_per_step / plan.cluster.num_gpus
    platform = platform_of(question)
    setting = setting_of(question, platform)
    return PlanRun(
        plan=plan,
        platform=platform,
        setting=setting,
        graph=load_graph(source, setting, progress=progress),
        seconds=read_log(log, tokens_per_gpu).step_s,
    )


def _names(platform: Platform) -> tuple[str, str]:
    return platform.runtime.name, platform.device.name


def _value(platform: Platform, name: str) -> float:
    record: object = platform
    for step in name.split("."):
        record = getattr(record, step)
    assert isinstance(record, Quantity)
    return record.value


def _interval(platform: Platform, errors: NDArray[np.float64], count: int) -> tuple[float, float]:
    """Measured over predicted steps: what is left, if any run is left to tell; else as before."""
    if len(errors) <= count:
        return platform.step_interval
    low, high = np.exp(-np.percentile(errors, [90, 10]))
    return min(float(low), 1 - LEAST_ERROR), max(float(high), 1 + LEAST_ERROR)


def _calibration(
    platform: Platform, values: Mapping[str, float], interval: tuple[float, float] = (1.0, 1.0)
) -> Calibration:
    """What is known already, and these values."""
    source = "fitted to measured runs by mist calibrate"
    known = platform.calibration.values if platform.calibration else {}
    return Calibration(
        schema="mist.calibration/1",
        runtime=platform.runtime.name,
        device=platform.device.name,
        step_low_ratio=calibrated(interval[0], source),
        step_high_ratio=calibrated(interval[1], source),
        values={**known, **{name: calibrated(value, source) for name, value in values.items()}},
    )
