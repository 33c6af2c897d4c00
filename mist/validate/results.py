"""What validation finds: a prediction of each run, a score of each source. Plain numbers."""

from dataclasses import dataclass
from typing import Literal

from mist.validate.measured_runs import Run

MemoryKind = Literal["allocated", "reserved", "active"]
Status = Literal["predicted", "refused", "unsupported", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPrediction:
    """What is predicted of a run; seconds and GiB are None unless `status` is predicted.

    A run whose layout no framework can run is refused: it is predicted to fail, and does not fit.

    `peak_gib`: of the kind of memory that the source reports; `low`, `high`: what it lies between,
    knobs of the runtime or columns of the run being unknown. `step_low_s`, `step_high_s`: what
    eight of ten runs lie between, so widened. `reason`: why nothing is predicted, or which columns
    of the run are blank and what is taken for them. `fits`: the reserved estimate against usable
    memory; `fit_probability`: the chance, 0..1, that it is within.
    """

    run: Run
    status: Status
    reason: str = ""
    platform: str = ""
    runtime: str = ""
    memory_kind: MemoryKind = "reserved"
    step_s: float | None = None
    step_low_s: float | None = None
    step_high_s: float | None = None
    peak_gib: float | None = None
    peak_low_gib: float | None = None
    peak_high_gib: float | None = None
    stage_gib: tuple[float, ...] = ()
    fits: bool | None = None
    fit_probability: float | None = None
    usable_gib: float | None = None
    calibrated: bool = False

    @property
    def is_predicted(self) -> bool:
        """Whether anything is predicted of the run, be it that it cannot run."""
        return self.status in ("predicted", "refused")


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Relative errors of `count` predictions: median and 90th percentile of |e|, median of e."""

    count: int
    median: float
    p90: float
    signed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Over `count` groups: mean and median regret, mean regret of the best of three, mean tau."""

    count: int
    mean_regret: float
    median_regret: float
    top3_regret: float
    tau: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One source. None where there is nothing to judge.

    `predicted`: runs of which something is predicted, be it that they cannot run.
    `core`: errors of times of dense pretraining in bf16 or fp16; `stage_memory`: of peaks of single
    pipeline stages; `constant`: of one rate for each GPU and precision; `naive`: the ranking by
    FLOPs and pipeline bubble.
    """

    source: str
    runs: int
    predicted: int
    time: Errors | None
    core: Errors | None
    memory: Errors | None
    stage_memory: Errors | None
    covered_ratio: float | None
    precision: float | None
    recall: float | None
    kept_ratio: float | None
    ranking: Ranking | None
    constant: Errors | None
    naive: Ranking | None
