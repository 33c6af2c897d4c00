"""The plan that a target can express, nearest to a given one, and what that changes.

Rounding never needs more memory of a device: ZeRO levels and recomputation go up, and so does what
is offloaded. What has no such neighbour is refused: stages that differ, pipelines, ratios.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

from mist.export.target import ExportLoss, Expresses, LossKind, refused, rounded
from mist.plans.knobs import STAGE_KNOBS
from mist.plans.memory_levels import (
    KEEPS_ALL,
    LEVELS,
    REPEATS_ALL,
    level_counts,
    levels_that,
)
from mist.plans.plan import Offload, Plan, StagePlan
from mist.plans.workload import HeadMode, MemoryLevel

AXES_OF_NO_PLAN = ("cp", "ep")
STATES = ("weights", "grads", "optimizer")


def expressible(plan: Plan, name: str, can: Expresses) -> tuple[Plan, tuple[ExportLoss, ...]]:
    """The plan as the target called `name` can say it, and every loss; the plan where refused."""
    refusals = tuple(_refusals(plan, name, can))
    if refusals:
        return plan, refusals
    losses: list[ExportLoss] = []
    stage = plan.stages[0]
    zero = can.zero[stage.zero]
    why = f"{name} has no such level"
    if stage.dp == 1 and not can.divides_alone:
        zero, why = 0, "there is one data-parallel rank"
    if zero != stage.zero:
        losses.append(rounded("stages[].zero", stage.zero, zero, why))
    offload, of_offload = _offload(stage.offload, name, can, zero)
    memory, of_memory = _memory(plan, name, can)
    losses += [*of_offload, *of_memory, *_sequence(stage, name, can)]
    stages = tuple(
        replace(each, zero=zero, offload=offload, memory=levels)
        for each, levels in zip(plan.stages, memory, strict=True)
    )
    fitting = replace(plan, stages=stages)
    losses += can.faults(fitting)
    return fitting, tuple(losses)


def refusals_of(losses: Sequence[ExportLoss]) -> tuple[ExportLoss, ...]:
    """Those for which nothing can be written."""
    return tuple(loss for loss in losses if loss.kind is LossKind.REFUSED)


def _refusals(plan: Plan, name: str, can: Expresses) -> Iterator[ExportLoss]:
    stages, first = plan.stages, plan.stages[0]
    if (head := stages[-1].head) != HeadMode.NONE:
        yield refused("stages[].head", f"{head}; {name} files do not say how the loss runs")
    for field in (*(knob.name for knob in STAGE_KNOBS if not knob.choices), "sp", "offload"):
        values = list(dict.fromkeys(_value_words(getattr(stage, field)) for stage in stages))
        if len(values) > 1:
            words = f"stages differ ({', '.join(values)}); {name} has the same in every stage"
            yield refused(f"stages[].{field}", words)
    for axis in AXES_OF_NO_PLAN:
        if getattr(first, axis) > 1:
            yield refused(f"stages[].{axis}", f"{getattr(first, axis)} is not predicted by Mist")
    yield from _unsaid(plan, name, can)
    yield from _unhosted(first, name, can)


def _value_words(value: object) -> str:
    """What a field of a stage says; of offloading, the shares."""
    if not isinstance(value, Offload):
        return str(value)
    shares = (f"{name} {ratio:g}" for name, ratio in asdict(value).items() if ratio)
    return " + ".join(shares) or "nothing"


def _unsaid(plan: Plan, name: str, can: Expresses) -> Iterator[ExportLoss]:
    """Values that the target has no words for."""
    stages, first = plan.stages, plan.stages[0]
    if len(stages) > 1 and not can.schedules:
        yield refused("stages", f"{len(stages)} pipeline stages; {name} files say one only")
    elif len(stages) > 1 and plan.schedule.kind not in can.schedules:
        known = ", ".join(can.schedules)
        yield refused("schedule.kind", f"{plan.schedule.kind}; {name} has {known}")
    if first.zero not in can.zero:
        yield refused("stages[].zero", f"{first.zero}; {name} has {', '.join(map(str, can.zero))}")
    if first.dp_replicate > 1 and not can.copies:
        yield refused("stages[].dp_replicate", f"{first.dp_replicate}; {name} divides over all dp")
    if plan.workload.precision not in can.precisions:
        known = ", ".join(can.precisions)
        yield refused("workload.precision", f"{plan.workload.precision}; {name} has {known}")


def _unhosted(stage: StagePlan, name: str, can: Expresses) -> Iterator[ExportLoss]:
    """What is offloaded and may not be."""
    together = "together" in can.hosted
    of_weights = {stage.offload.weights, stage.offload.grads}
    for field, ratio in asdict(stage.offload).items():
        if not ratio or field in can.hosted:
            continue
        # The optimizer follows where weights and gradients are wholly in host memory.
        if together and field in STATES and of_weights == {1.0}:
            continue
        what = "weights, gradients and optimizer at once, or nothing" if together else "no share"
        yield refused(f"stages[].offload.{field}", f"{ratio:g}; {name} offloads {what} of it")


def _offload(
    offload: Offload, name: str, can: Expresses, zero: int
) -> tuple[Offload, list[ExportLoss]]:
    """All of a state where its target takes no share of it."""
    ratio = offload.optimizer
    shares = zero >= can.shares_from
    together = "together" in can.hosted and offload.weights == 1.0
    whole = 1.0 if (ratio > 0 and not shares) or together else ratio
    if whole == ratio:
        return offload, []
    words = f"{name} offloads all of it or nothing here"
    loss = rounded("stages[].offload.optimizer", f"{ratio:g}", f"{whole:g}", words)
    return replace(offload, optimizer=whole), [loss]


Levels = dict[MemoryLevel, int]


def _memory(plan: Plan, name: str, can: Expresses) -> tuple[list[Levels], list[ExportLoss]]:
    """Layers of each stage at each memory level."""
    before = [_counts(stage.levels) for stage in plan.stages]
    kinds = {level for counts in before for level, count in counts.items() if count}
    partly = levels_that(lambda row: row.repeats == "part", kinds)
    # A target's own part may keep more than another level does: that one repeats everything.
    if partly and REPEATS_ALL not in kinds and set(partly) <= set(can.partly):
        after = [_counts(partly[-1:] * stage.num_layers) for stage in plan.stages]
    else:
        after = _repeated(plan, can)
    losses = []
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        if old != new:
            why = f"{name} recomputes {_habit(can)}"
            losses.append(rounded(f"stages[{index}].memory", _words(old), _words(new), why))
    return after, losses


def _repeated(plan: Plan, can: Expresses) -> list[Levels]:
    """Layers that repeat anything repeat everything, and as many more as the target demands."""
    chunks = [_repeated_of_chunks(stage) for stage in plan.stages]
    most = max(count for stage in chunks for count in stage)
    after = []
    for stage, own in zip(plan.stages, chunks, strict=True):
        sizes = [size for _, size in stage.layers]
        repeated = {
            "any": sum(own),
            "first": sum(min(most, size) for size in sizes),
            "all": stage.num_layers if most else 0,
        }[can.repeats]
        rest = stage.num_layers - repeated
        after.append(_counts((KEEPS_ALL,) * rest + (REPEATS_ALL,) * repeated))
    return after


def _repeated_of_chunks(stage: StagePlan) -> list[int]:
    """Layers of each chunk of a stage that repeat something."""
    levels = iter(stage.levels)
    return [
        sum(LEVELS[next(levels)].repeats != "nothing" for _ in range(size))
        for _, size in stage.layers
    ]


def _counts(levels: Sequence[MemoryLevel]) -> Levels:
    return level_counts(*((level, 1) for level in levels))


def _words(counts: Levels) -> str:
    return " ".join(f"{count} {level}" for level, count in counts.items() if count)


def _habit(can: Expresses) -> str:
    return {
        "any": "whole layers, or a part of all",
        "first": "the same number of whole layers in each chunk, or a part of all layers",
        "all": "all layers or none",
    }[can.repeats]


def _sequence(stage: StagePlan, name: str, can: Expresses) -> Iterator[ExportLoss]:
    if stage.sp and not can.sequence:
        why = f"{name} files do not say it; the model's own tensor-parallel plan decides"
        yield rounded("stages[].sp", "true", "unsaid", why)
