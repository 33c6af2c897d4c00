"""What a plan predicted beside what its run measured, figure by figure."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mist.calibrate.logs import CollectiveRow, RunLog
from mist.explain import step_parts
from mist.plans import Plan, StageEstimate

Unit = Literal["s", "tokens/s", "B"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """One figure, predicted and measured, in `unit`.

    `allowed_ratio`: the error that the plan admits, of the predicted value. `spread_ratio`: half
    the range of the middle half of what was measured, over its median (0: measured once).
    """

    what: str
    unit: Unit
    predicted: float
    measured: float
    allowed_ratio: float
    spread_ratio: float = 0.0

    @property
    def error_ratio(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted / self.measured - 1.0

    @property
    def is_within(self) -> bool:
        """Whether what was measured lies in the predicted interval."""
        return abs(self.measured - self.predicted) <= self.allowed_ratio * self.predicted


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A plan and its run.

    `parts_s`: the predicted step by part, from the slowest stage; they sum to it. `collectives`:
    of each stage, as they were counted in one step of its first rank.
    """

    plan: Plan
    rows: tuple[Beside, ...]
    parts_s: dict[str, float]
    collectives: tuple[tuple[CollectiveRow, ...], ...]
    num_steps: int


def compared(plan: Plan, log: RunLog) -> Compared:
    """Set a plan beside the log of its run; stages that the log lacks are left out."""
    return Compared(
        plan=plan,
        rows=tuple(_rows(plan, log)),
        parts_s=step_parts(plan.estimate, plan.num_micro_batches),
        collectives=tuple(stage.collectives for stage in log.stages),
        num_steps=len(log.seconds),
    )


def _rows(plan: Plan, log: RunLog) -> Iterator[Beside]:
    predicted, allowed = plan.estimate, plan.estimate.uncertainty
    spread = {"spread_ratio": log.spread_ratio, "allowed_ratio": allowed.step_ratio}
    yield Beside(what="step", unit="s", predicted=predicted.step_s, measured=log.step_s, **spread)
    yield Beside(
        what="throughput",
        unit="tokens/s",
        predicted=predicted.tokens_per_s,
        measured=plan.workload.tokens_per_step / log.step_s,
        **spread,
    )
    for index, (stage, found) in enumerate(zip(predicted.stages, log.stages, strict=False)):
        yield Beside(
            what=f"stage {index}: peak",
            unit="B",
            predicted=live_bytes(stage),
            measured=found.peak_bytes,
            allowed_ratio=allowed.memory_ratio,
        )


def live_bytes(stage: StageEstimate) -> float:
    """The predicted peak of tensors: without what the allocator rounds up and cannot use."""
    return float(stage.peak_bytes - stage.memory_parts_bytes.get("allocator", 0))
