"""`mist calibrate`: what one's own measured runs say about the constants behind the plans."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mist.calibrate.fit import Posterior, Prior, fitted, of_names
from mist.calibrate.logs import read_log
from mist.errors import InputError
from mist.plans.file import load_plan
from mist.plans.plan import Layout
from mist.platform import Platform, Quantity
from mist.platform.calibration import LARGEST, SPREAD, Calibration, calibrated
from mist.symbolic.estimate import step_at
from mist.symbolic.job import Job
from mist.workflow.checking import HandLayout, of_level, plan_by_hand, question_of
from mist.workflow.plan_model import UNDER_HERE, ModelAccess, model_of
from mist.workflow.request import Question, prepare

# What is known of a constant that no fit speaks of: the standard deviation of its logarithm.
WIDTHS: Final = {
    "device.tensor_time_scale": 0.7,
    "runtime.kernels.memory_time_scale": 0.5,
    "cluster.network.efficiency_ratio": 0.5,
    "cluster.network.hop_s": 0.7,
    "runtime.overlap.tensor_parallel_time_scale": 0.5,
    "runtime.host.layer_launch_s": 0.5,
}
FACTOR: Final = 4.0  # a constant ends between a quarter and four times of where it starts
FEWEST: Final = 3  # runs that say how far predictions are off
FITTED: Final = "fitted to measured runs by mist calibrate"
# Of a platform that no public run is of: what no constant explains, and between how many standard
# deviations eight of ten values of a normal distribution lie.
REST: Final = 0.1
ENDS: Final = (1.28, 1.28)
NORMAL: Final = "as a normal distribution has it: no public run is of this runtime and device"
# Rounded matrices may have lost their inverse.
RIDGE: Final = 1e-4
# What a run teaches: the constants that it measures, and how to make it. The order is of what helps
# most in published runs.
LESSONS: Final = (
    ("device.tensor_time_scale", "a run on one node"),
    ("cluster.network.efficiency_ratio",
     "a run on all nodes that waits for the network (one sample a rank, a short sequence)"),
    ("runtime.overlap.tensor_parallel_time_scale", "a run with tensor parallelism"),
)  # fmt: skip
LEARNED: Final = 0.7  # of its standard deviation: a constant that keeps more was not measured


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRun:
    """A layout that was run, what it is priced by, and the median of its steps."""

    job: Job
    layout: Layout
    seconds: float

    @property
    def platform(self) -> Platform:
        """Where it ran."""
        return self.job.platform

    def log_error(self, values: Mapping[str, float]) -> float:
        """log(predicted / measured) with these constants."""
        quantities = {name: calibrated(value, FITTED) for name, value in values.items()}
        return float(np.log(step_at(self.job, self.layout, quantities) / self.seconds))


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """What was fitted: constants before and after, and log errors of the runs before and after.

    `lessons`: what one more run would teach, most helpful first.
    """

    calibration: Calibration
    before: Mapping[str, float]
    after: Mapping[str, float]
    errors_before: tuple[float, ...]
    errors_after: tuple[float, ...]
    lessons: tuple[str, ...]


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
    prior = _prior(first)

    def errors_at(values: Mapping[str, float]) -> NDArray[np.float64]:
        return np.array([run.log_error(values) for run in runs])

    found = fitted(of_names(errors_at, prior.names), prior)
    before = dict(zip(prior.names, np.exp(prior.mean).tolist(), strict=True))
    return Calibrated(
        calibration=_calibration(first, found),
        before=before,
        after=found.values,
        errors_before=tuple(errors_at(before).tolist()),
        errors_after=tuple(found.errors.tolist()),
        lessons=tuple(_lessons(prior, found)),
    )


def _prior(platform: Platform) -> Prior:
    """What is known of the constants: by the fit that ships for this platform, else by `WIDTHS`."""
    known = platform.calibration
    if known is not None and known.covariance:
        names, covariance = tuple(known.values), known.matrix
    else:
        names = tuple(name for name in WIDTHS if _value(platform, name))
        covariance = np.diag([WIDTHS[name] ** 2 for name in names])
    mean = np.log([_value(platform, name) for name in names])
    most = np.log([LARGEST.get(name, np.inf) for name in names])
    return Prior(
        names=names,
        mean=mean,
        precision=np.asarray(np.linalg.inv(covariance + RIDGE * np.eye(len(names))), np.float64),
        low=mean - np.log(FACTOR),
        high=np.minimum(mean + np.log(FACTOR), most),
    )


def _lessons(prior: Prior, found: Posterior) -> Iterator[str]:
    """What the runs did not say."""
    before = np.sqrt(np.diag(np.linalg.inv(prior.precision)))
    after = np.sqrt(np.diag(found.covariance))
    for name, words in LESSONS:
        if name in prior.names:
            place = prior.names.index(name)
            if after[place] > LEARNED * before[place]:
                yield f"{words} would say more of {name} (a factor of {np.exp(after[place]):.2f})"


def _measured(
    ran: Path | RunByHand, log: Path, progress: Callable[[str], None], access: ModelAccess
) -> PlanRun:
    if isinstance(ran, RunByHand):
        job, plan = plan_by_hand(of_level(ran.question, ran.layout), ran.layout, progress)
    else:
        plan = load_plan(ran)
        question = question_of(plan, ran, model_of(plan, ran, access, progress))
        job = prepare(question, progress)
    tokens_per_gpu = plan.workload.tokens_per_step / plan.cluster.num_gpus
    return PlanRun(job=job, layout=plan.layout, seconds=read_log(log, tokens_per_gpu).step_s)


def _names(platform: Platform) -> tuple[str, str]:
    return platform.runtime.name, platform.device.name


def _value(platform: Platform, name: str) -> float:
    record: object = platform
    for step in name.split("."):
        record = getattr(record, step)
    assert isinstance(record, Quantity)
    return record.value


def _calibration(platform: Platform, found: Posterior) -> Calibration:
    """What was known already, and what the runs say of it."""
    known, covariance = platform.calibration, found.covariance.tolist()
    rest, low, high = (
        [getattr(known, name) for name in SPREAD]
        if known is not None
        else [calibrated(each, NORMAL) for each in (REST, *ENDS)]
    )
    left = float(np.sqrt(np.mean(found.errors**2)))
    if len(found.errors) >= FEWEST and left > rest.value:
        rest = calibrated(left, FITTED)
    return Calibration(
        schema="mist.calibration/1",
        runtime=platform.runtime.name,
        device=platform.device.name,
        rest_deviation=rest,
        low_deviations=low,
        high_deviations=high,
        values={name: calibrated(value, FITTED) for name, value in found.values.items()},
        covariance=tuple(
            tuple(float(f"{x:.4g}") for x in row[: k + 1]) for k, row in enumerate(covariance)
        ),
    )
