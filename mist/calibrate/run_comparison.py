"""The figures that a plan predicted, compared with those that its run measured."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mist.calibrate.logs import CollectiveRow, LoggedRun, StageParts
from mist.plans.breakdown import step_parts
from mist.plans.plan import Plan, StageEstimate

Unit = Literal["s", "tokens/s", "B"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """One figure, predicted and measured, in `unit`.

    `low_ratio`, `high_ratio`: ends of the interval of the measured over the predicted value that
    the plan states. `spread_ratio`: half the range of the middle half of what was measured, over
    its median (0: measured once).
    """

    what: str
    unit: Unit
    predicted: float
    measured: float
    low_ratio: float
    high_ratio: float
    spread_ratio: float = 0.0

    @property
    def error_ratio(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted / self.measured - 1.0

    @property
    def is_within(self) -> bool:
        """Whether what was measured lies in the predicted interval."""
        return self.low_ratio <= self.measured / self.predicted <= self.high_ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class RunComparison:
    """A plan and its run.

    `parts_s`: the predicted step by part, from the slowest stage; they sum to it. `stages`: the
    step of each stage in two, predicted and measured, where the log has it. `collectives`: of each
    stage, as they were counted in one step of its first rank.
    """

    plan: Plan
    rows: tuple[Beside, ...]
    parts_s: dict[str, float]
    stages: tuple["StageStep", ...]
    collectives: tuple[tuple[CollectiveRow, ...], ...]
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStep:
    """A step of one stage, in seconds: at work, and the rest: transfers, sums and waiting.

    Predicted work: G micro-batches without their transfers, and what the first and the last cost
    more, optimizer included; measured: passes and optimizer, by `parts`. Both sum to their step.
    """

    predicted_work_s: float
    predicted_rest_s: float
    work_s: float
    rest_s: float
    parts: StageParts


def stage_steps(plan: Plan, log: LoggedRun) -> Iterator[StageStep]:
    """The two halves of the step of every stage; `rest_s` is of median steps and medians of parts.

    Nothing for a log without seconds of stages.
    """
    for stage, parts in zip(plan.estimate.stages, log.parts, strict=False):
        each_s = stage.stable_s - stage.time_parts_s.get("p2p", 0.0)
        predicted_s = plan.num_micro_batches * each_s + stage.delta_s
        work_s = parts.forward_s + parts.backward_s + parts.optimizer_s
        yield StageStep(
            predicted_work_s=predicted_s,
            # Plans are rounded, which can make the difference negative.
            predicted_rest_s=max(plan.estimate.step_s - predicted_s, 0.0),
            work_s=work_s,
            rest_s=log.step_s - work_s,
            parts=parts,
        )


def compared(plan: Plan, log: LoggedRun) -> RunComparison:
    """Compare a plan with the log of its run; stages that the log lacks are left out."""
    return RunComparison(
        plan=plan,
        rows=tuple(_rows(plan, log)),
        parts_s=step_parts(plan.estimate, plan.num_micro_batches),
        stages=tuple(stage_steps(plan, log)),
        collectives=tuple(stage.collectives for stage in log.stages),
        num_steps=len(log.seconds),
    )


def _rows(plan: Plan, log: LoggedRun) -> Iterator[Beside]:
    predicted, allowed = plan.estimate, plan.estimate.uncertainty
    low, high = allowed.step_low_ratio, allowed.step_high_ratio
    yield Beside(
        what="step",
        unit="s",
        predicted=predicted.step_s,
        measured=log.step_s,
        low_ratio=low,
        high_ratio=high,
        spread_ratio=log.spread_ratio,
    )
    yield Beside(
        what="throughput",
        unit="tokens/s",
        predicted=predicted.tokens_per_s,
        measured=plan.workload.tokens_per_step / log.step_s,
        # A longer step is a lower throughput: the ends change places.
        low_ratio=1 / high,
        high_ratio=1 / low,
        spread_ratio=log.spread_ratio,
    )
    for index, (stage, logged) in enumerate(zip(predicted.stages, log.stages, strict=False)):
        yield Beside(
            what=f"stage {index}: peak",
            unit="B",
            predicted=live_bytes(stage),
            measured=logged.peak_bytes,
            low_ratio=1 - allowed.memory_ratio,
            high_ratio=1 + allowed.memory_ratio,
        )


def live_bytes(stage: StageEstimate) -> float:
    """The predicted peak of tensors: without what the allocator rounds up and cannot use."""
    return float(stage.peak_bytes - stage.memory_parts_bytes.get("allocator", 0))
