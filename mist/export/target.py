"""What an export is: the files of a target, what was lost on the way, and the inverse.

A target is a framework or a launcher. Its row says what it can express (`Expresses`); a writer gets
a plan that is within that, so that no writer refuses or rounds anything itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Literal

from mist.plans.plan import NOTHING_OFFLOADED, Offload, Plan
from mist.plans.schedules import DEFAULT_KIND
from mist.plans.workload import MemoryLevel, Precision, ScheduleKind

MARK: Final = "mist export"  # by which a file that was exported before is known


class LossKind(StrEnum):
    """What became of a field: nothing that could be said, another value, or more than it says."""

    REFUSED = "REFUSED"
    ROUNDED = "ROUNDED"
    ADDED = "ADDED"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportLoss:
    """One difference between a plan and its export: of which field of the plan, and what."""

    kind: LossKind
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind} {self.field}: {self.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Expresses:
    """What a target can express, all of it the same in every stage.

    Args:
        zero: the level that each level becomes; one that is missing is refused.
        schedules: the target's name of each; none: one stage only.
        divides_alone: whether a single data-parallel rank may have a ZeRO level.
        copies: whether divided states may have copies (`dp_replicate`).
        precisions: what it trains in.
        partly: levels that repeat a part of a layer, which all layers may have.
        repeats: which layers may repeat everything: any of them, the first ones of each chunk (the
            same number in each), or all or none.
        sequence: whether it is stated that tensor parallelism shards the sequence.
        hosted: states that may be offloaded; "together": all of weights, gradients and optimizer,
            or nothing.
        shares_from: the ZeRO level from which on a share of the optimizer may be.
        faults: what else it refuses of a plan.
    """

    zero: Mapping[int, Literal[0, 1, 2, 3]]
    schedules: Mapping[ScheduleKind, str] = field(default_factory=dict)
    divides_alone: bool = True
    copies: bool = False
    precisions: Sequence[Precision] = tuple(Precision)
    partly: tuple[MemoryLevel, ...] = ()
    repeats: Literal["any", "first", "all"] = "all"
    sequence: bool = False
    hosted: frozenset[str] = frozenset()
    shares_from: int = 4
    faults: Callable[[Plan], Sequence[ExportLoss]] = lambda _: ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSource:
    """What is written: a plan that the target can express, and where it and its model come from.

    `path`: of the plan file, as a comment says it. `config`: fields of the Hugging Face
    configuration of the model; none where its source is a Python file.
    """

    plan: Plan
    path: str
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """Text of each file by its name, and what had to be added."""

    files: Mapping[str, str]
    added: Sequence[ExportLoss] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """A layout as a file of a target says it; None or missing for what it leaves open.

    Args:
        knobs: whole numbers by `Knob.field`.
        checkpoint: a memory level, or how many layers of each stage are run again whole (3 or 3,1).
        layers: of each chunk of each stage, in the order of the model; none: the target's own.
        num_micro_batches: that the file states, to be compared with what follows from the batch.
        dp: data-parallel ranks that the file states.
        num_layers: of the model, as the file states them.
        model: as the file names it: of a hub, a folder, or a preset.
        launched: ranks that a script starts, where its user may start another number.
        shards_sequence: whether tensor parallelism shards the sequence.
        runtimes: whose predictions hold for the file, where not the target's.
        unmodelled: settings that predictions do not know, as they stand in the file.
        untouched: names of those that change neither time nor memory.
    """

    knobs: Mapping[str, int]
    checkpoint: str | None = None
    schedule: ScheduleKind = DEFAULT_KIND
    offload: Offload = NOTHING_OFFLOADED
    layers: tuple[int, ...] = ()
    seq_len: int | None = None
    global_batch: int | None = None
    precision: Precision | None = None
    num_gpus: int | None = None
    num_micro_batches: int | None = None
    dp: int | None = None
    num_layers: int | None = None
    model: str | None = None
    launched: int | None = None
    shards_sequence: bool | None = None
    runtimes: Sequence[str] = ()
    unmodelled: tuple[str, ...] = ()
    untouched: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A row of the table.

    Args:
        name: of `--to`.
        what: what is written, in a line.
        runtimes: whose predictions hold for it, the first that can do the layout; none: the plan's.
        expresses: None for a launcher of `mist apply`, which takes any plan.
        write: the files of a plan.
        recognises: whether a text is a file of this target; None: such files are not read.
        read: the layout that a text says. Raises InputError.
        names: of settings of its files, each with the option of `mist check` that it answers,
            named with _.
    """

    name: str
    what: str
    runtimes: Sequence[str]
    expresses: Expresses | None
    write: Callable[[ExportSource], Written]
    recognises: Callable[[str], bool] | None = None
    read: Callable[[str, str], Configuration] | None = None
    names: Mapping[str, str] = field(default_factory=dict)


def added(about: str, message: str) -> ExportLoss:
    """That a file says more than the plan."""
    return ExportLoss(kind=LossKind.ADDED, field=about, message=message)


def by_its_own_rules(plan: Plan) -> list[ExportLoss]:
    """What transformers divides of a model otherwise than the plan, for targets that let it."""
    words = "transformers divides by its own rules: attention with norms over all heads stays whole"
    return [added("stages[].tp", words)] if plan.stages[0].tp > 1 else []


def refused(about: str, message: str) -> ExportLoss:
    """That the target has no words for a field."""
    return ExportLoss(kind=LossKind.REFUSED, field=about, message=message)


def rounded(about: str, old: object, new: object, why: str) -> ExportLoss:
    """That a field has another value in the export."""
    return ExportLoss(kind=LossKind.ROUNDED, field=about, message=f"{old} -> {new} ({why})")


def undivided_offload(plan: Plan, target: str) -> list[ExportLoss]:
    """What a target refuses that offloads by FSDP, where FSDP divides nothing."""
    stage = plan.stages[0]
    if stage.zero or not stage.offload.weights:
        return []
    words = f"{stage.offload.weights:g} at ZeRO-0; {target} offloads what FSDP divides"
    return [refused("stages[].offload.weights", words)]
