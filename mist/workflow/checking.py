"""`mist check`: judge a plan file or a layout written by hand, and say what would help."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, make_dataclass, replace
from pathlib import Path
from typing import Any

from mist.errors import InputError, PlanError
from mist.pareto.default_partition import dealing_words, dealt_layers
from mist.plans.file import load_plan
from mist.plans.host_memory import HostNeed
from mist.plans.knobs import AT_REST, SEARCHED_KNOBS, TYPED_KNOBS
from mist.plans.memory_levels import KEEPS_ALL, memory_of
from mist.plans.plan import (
    NOTHING_OFFLOADED,
    Layout,
    Limits,
    Offload,
    Plan,
    Schedule,
)
from mist.plans.schedules import DEFAULT_KIND, SCHEDULES
from mist.plans.search_space import CHECKPOINTS, OFFLOADED
from mist.plans.uniform_stages import uniform_layout
from mist.plans.workload import HeadMode, MemoryLevel, ScheduleKind, batches_near
from mist.platform import Platform
from mist.platform.overrides import NO_OVERRIDES, Overrides
from mist.platform.profiles import is_machine
from mist.rules.combinations import knob_rules
from mist.rules.levels import broken_levels
from mist.rules.rule import broken
from mist.symbolic.estimate import estimate
from mist.symbolic.job import Job
from mist.symbolic.load_programs import Progress, quiet
from mist.units import parse_whole
from mist.workflow.advice import Remedy, suggestions
from mist.workflow.plan_against_job import pipeline_faults, plan_against
from mist.workflow.plan_model import UNDER_HERE, ModelAccess, model_of
from mist.workflow.request import (
    Question,
    host_need,
    limits_of,
    notes_of,
    platform_of,
    prepare,
    unsearched_plan,
)

# A field for each knob, so that a new row of the table is one that a user may set.
_KnobFields: Any = make_dataclass(
    "_KnobFields",
    [(knob.field, int, knob.least) for knob in TYPED_KNOBS],
    frozen=True,
    slots=True,
    kw_only=True,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HandLayout(_KnobFields):  # type: ignore[misc]  # a generated class
    """A layout as a user types it, the same for all stages; knobs by `Knob.field`.

    `checkpoint`: a memory level, or of how many layers of each stage everything is run again: one
    number for all stages ("3") or one for each ("3,1").
    `layers`: of each stage, and with chunks of each chunk in the order of the layers; none for the
    runtime's own split.
    """

    checkpoint: str = KEEPS_ALL.value
    schedule: ScheduleKind = DEFAULT_KIND
    head: HeadMode = HeadMode.NONE
    offload: Offload = NOTHING_OFFLOADED
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for knob in TYPED_KNOBS:
            value = getattr(self, knob.field)
            if not knob.means(value):
                raise InputError(f"--{knob.word} {value} {knob.complaint(value)}.")
        if self.checkpoint not in CHECKPOINTS:
            _check_counts(self)
        if (self.vpp > 1) is not (SCHEDULES[self.schedule].least_chunks > 1):
            raise InputError(
                f"--schedule {self.schedule} with --vpp {self.vpp}: interleaved takes 2 or more "
                "chunks per stage, the others 1."
            )
        _check_split(self)

    def memory(self, num_layers: int, stage: int) -> dict[MemoryLevel, int]:
        """Layers of a stage of `num_layers`, counted from 0, at each memory level."""
        if self.checkpoint in CHECKPOINTS:
            return memory_of(num_layers, CHECKPOINTS[self.checkpoint])
        counts = self.checkpoint.split(",")
        return memory_of(num_layers, KEEPS_ALL, int(counts[stage if len(counts) > 1 else 0]))


def _check_counts(layout: HandLayout) -> None:
    """Refuse what is no number of layers, and numbers that are not one for each stage."""
    words = layout.checkpoint.split(",")
    try:
        are_counts = all(parse_whole(word) >= 0 for word in words)
    except ValueError:
        are_counts = False
    if not are_counts:
        raise InputError(
            f"--checkpoint {layout.checkpoint} is neither {', '.join(CHECKPOINTS)} "
            "nor a number of layers."
        )
    if len(words) not in (1, layout.pp):
        raise InputError(
            f"--checkpoint {layout.checkpoint}: {len(words)} numbers for {layout.pp} pipeline "
            "stages. Give one for all, or one for each."
        )


def _check_split(layout: HandLayout) -> None:
    """Refuse a stated split that has not a number of layers for each chunk of each stage."""
    words, num_parts = ",".join(map(str, layout.layers)), layout.pp * layout.vpp
    if layout.layers and len(layout.layers) != num_parts:
        chunks = f" of {layout.vpp} chunks" if layout.vpp > 1 else ""
        raise InputError(
            f"--layers {words}: {len(layout.layers)} numbers for {layout.pp} pipeline stages"
            f"{chunks}. Give {num_parts}, in the order of the layers."
        )
    if min(layout.layers, default=1) < 1:
        raise InputError(f"--layers {words}: every stage and chunk has at least one layer.")


def layers_of(words: str) -> tuple[int, ...]:
    """Layers of each stage from "8,8,7"; none from "". Raises InputError for what is none."""
    try:
        return tuple(map(parse_whole, words.split(","))) if words else ()
    except ValueError:
        raise InputError(
            f"--layers {words}: expected whole numbers with commas between them (8,8,7)."
        ) from None


def offload_of(words: Iterable[str]) -> Offload:
    """Ratios from words such as "optimizer=0.5". Raises InputError for what is none."""
    ratios: dict[str, float] = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            ratio = float(value)
        except ValueError:
            ratio = -1.0
        if name not in OFFLOADED or not 0 <= ratio <= 1:
            raise InputError(
                f"--offload {word}: expected {', '.join(OFFLOADED)} with a ratio from 0 to 1."
            )
        ratios[name] = ratio
    return Offload(**ratios)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A judged plan: does it fit within the limits, by how much, and what would help.

    `remedies`: the changed layouts among the suggestions, which come first.
    """

    plan: Plan
    limits: Limits
    host: HostNeed
    notes: tuple[str, ...]
    suggestions: tuple[str, ...]
    remedies: tuple[Remedy, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """Of the stage that needs most."""
        return max(stage.peak_bytes for stage in self.plan.estimate.stages)

    @property
    def margin_bytes(self) -> float:
        """What the limit leaves on the tightest stage; negative when it does not fit."""
        return self.limits.device_bytes - self.peak_bytes

    @property
    def fits(self) -> bool:
        """Whether every device stays within its limit, and every node within its memory."""
        return self.margin_bytes >= 0 and self.host.fits


def check_layout(question: Question, layout: HandLayout, progress: Progress = quiet) -> Checked:
    """Judge a layout written by hand.

    Raises InputError naming every rule that it breaks.
    """
    question = of_level(question, layout)
    job, plan = plan_by_hand(question, layout, progress)
    limits = limits_of(job, question)
    host = host_need(job, plan.layout, plan.estimate, limits)
    notes = tuple(notes_of(job))
    checked = Checked(plan=plan, limits=limits, host=host, notes=notes, suggestions=())
    helpful = tuple(suggestions(question, job, layout, checked, _made))
    return replace(
        checked,
        suggestions=tuple(one if isinstance(one, str) else one.words for one in helpful),
        remedies=tuple(one for one in helpful if not isinstance(one, str)),
    )


def of_level(question: Question, layout: HandLayout) -> Question:
    """The question of a layout of one memory level and head: no other is traced."""
    if layout.checkpoint in CHECKPOINTS:
        question = replace(question, levels=(CHECKPOINTS[layout.checkpoint],))
    return replace(question, heads=(layout.head,))


def plan_by_hand(
    question: Question, layout: HandLayout, progress: Progress = quiet
) -> tuple[Job, Plan]:
    """The plan of a layout written by hand, and what was priced for it.

    Raises InputError naming every rule that it breaks.
    """
    _refuse_early(question, layout, platform_of(question))
    job = prepare(question, progress, layout.tp)
    made = _made(job, layout)
    return job, unsearched_plan(job, question, made, estimate(job, made))


def check_plan(
    path: str | Path,
    *,
    margin_ratio: float | None = None,
    overrides: Overrides = NO_OVERRIDES,
    access: ModelAccess = UNDER_HERE,
    progress: Progress = quiet,
) -> Checked:
    """Judge a plan file again, with the profiles and the model as they are now.

    `margin_ratio`: None for the one that the plan was made with. `overrides`: figures of profiles
    in addition to those of the plan, or in place of them. `access`: to its model. Raises PlanError
    when the file is broken, is a plan for another model, or asks for what is not predicted or
    breaks a rule, and InputError for a model that may not run.
    """
    plan = load_plan(path)
    plan = replace(plan, overrides={**plan.overrides, **overrides})
    source = model_of(plan, Path(path), access, progress)
    question = question_of(plan, Path(path), source, margin_ratio)
    job = prepare(question, progress)
    if faults := plan_against(plan, job):
        raise PlanError(str(path), faults)
    judged, limits = estimate(job, plan.layout), limits_of(job, question)
    return Checked(
        plan=replace(plan, estimate=judged),
        limits=limits,
        host=host_need(job, plan.layout, judged, limits),
        notes=tuple(_notes(plan, job)),
        suggestions=(),
    )


def question_of(plan: Plan, path: Path, source: str, margin_ratio: float | None = None) -> Question:
    """The question that a plan answers about a model (`plan_model.model_of`).

    The file of the machine that was measured for it is looked for here and beside the plan.
    """
    workload = plan.workload
    return Question(
        model=source,
        num_gpus=plan.cluster.num_gpus,
        gpu=plan.cluster.device,
        cluster=_cluster_of(plan, path),
        runtime=plan.runtime,
        seq_len=workload.seq_len,
        global_batch=workload.global_batch,
        precision=workload.precision,
        optimizer=workload.optimizer,
        attention=workload.attention,
        images=workload.images,
        margin_ratio=_margin(plan) if margin_ratio is None else margin_ratio,
        overrides=plan.overrides,
        levels=tuple(dict.fromkeys(level for stage in plan.stages for level in stage.levels)),
        heads=(plan.stages[-1].head,),
    )


def _cluster_of(plan: Plan, path: Path) -> str:
    """The cluster by name, or the file of a measured machine of that name, here or by the plan."""
    name = plan.cluster.name
    files = (Path(f"{name}.yaml"), path.parent / f"{name}.yaml")
    return next((str(f.absolute()) for f in files if is_machine(f)), name)


def _margin(plan: Plan) -> float | None:
    """The margin that a plan was made with, if it says so."""
    margin = plan.provenance.search.get("margin")
    return float(margin) if isinstance(margin, int | float) else None


def _notes(plan: Plan, job: Job) -> Iterator[str]:
    """What the trace says, and what changed since the plan was made."""
    yield from notes_of(job)
    now = job.platform.profile_hashes()
    for name in sorted(plan.provenance.profiles):
        if now.get(name) != plan.provenance.profiles[name]:
            yield f"profile {name} has changed since the plan was made: the figures are new"


def _made(job: Job, layout: HandLayout) -> Layout:
    """Stages alike in all but the number of layers, which are stated or dealt out by the runtime.

    Raises InputError naming every broken rule.
    """
    num_gpus, ranks = job.platform.num_gpus, layout.tp * layout.pp
    if num_gpus % ranks:
        raise InputError(_ranks_words(layout, num_gpus))
    dp = num_gpus // ranks
    num_micro_batches = max(job.workload.global_batch // (dp * layout.micro_batch), 1)
    columns = _columns(layout, dp) | {"num_micro_batches": num_micro_batches}
    _refuse(broken(job.rules, columns))
    counts, pp = _split(job, layout), layout.pp
    made = uniform_layout(
        {name: columns[name] for name in AT_REST if name in columns},
        chunk_layers=counts,
        memory=[layout.memory(sum(counts[stage::pp]), stage) for stage in range(pp)],
        num_micro_batches=num_micro_batches,
        schedule=Schedule(kind=layout.schedule, vpp=layout.vpp),
        offload=layout.offload,
        shards_sequence=job.platform.runtime.knobs.sequence_parallel,
    )
    _refuse(fault.message for fault in pipeline_faults(job, made))
    return made


def _refuse_batch(batch: int, dp: int, micro_batch: int) -> None:
    """Raise InputError for a global batch that is no whole number of micro-steps."""
    step = dp * micro_batch
    if batch % step:
        near = " or ".join(map(str, batches_near(batch, step)))
        advice = f"--global-batch {near}" if near else "a smaller --micro-batch"
        raise InputError(
            f"--global-batch {batch}: dp {dp} * micro-batch {micro_batch} = {step} does not "
            f"divide it. Try {advice}."
        )


def _ranks_words(layout: HandLayout, num_gpus: int) -> str:
    ranks = layout.tp * layout.pp
    product = f"--tp {layout.tp} * --pp {layout.pp} = {ranks}"
    if ranks > num_gpus:
        return f"{product} is more than the {num_gpus} GPUs."
    return f"{product} does not divide the {num_gpus} GPUs."


def _columns(layout: HandLayout, dp: int) -> dict[str, str | float]:
    """What rules about the runtime's knobs look at."""
    return {
        **{knob.name: getattr(layout, knob.field) for knob in TYPED_KNOBS},
        "dp": dp,
        "head": SEARCHED_KNOBS["head"].number_of(layout.head),
        "schedule": layout.schedule.value,
        **asdict(layout.offload),
    }


def _refuse_early(question: Question, layout: HandLayout, platform: Platform) -> None:
    """Raise InputError for what cannot be, whatever the model: before it is traced.

    Knobs that the runtime does not have, ranks that are not the GPUs, a batch that does not divide.
    """
    rules = tuple(knob_rules(platform.runtime))
    levels = [CHECKPOINTS[layout.checkpoint]] if layout.checkpoint in CHECKPOINTS else []
    if platform.num_gpus % (layout.tp * layout.pp):
        raise InputError(_ranks_words(layout, platform.num_gpus))
    dp = platform.num_gpus // (layout.tp * layout.pp)
    _refuse([*broken(rules, _columns(layout, dp)), *broken_levels(platform.runtime, levels)])
    _refuse_batch(question.global_batch, dp, layout.micro_batch)


def _refuse(messages: Iterable[str]) -> None:
    """Raise InputError with every message, if there are any."""
    if text := "\n".join(dict.fromkeys(messages)):  # stages alike have faults alike
        raise InputError(text)


def _split(job: Job, layout: HandLayout) -> tuple[int, ...]:
    """Layers of each chunk of each stage: as stated, or dealt out by the runtime's own rule."""
    if layout.layers and sum(layout.layers) != job.num_layers:
        raise InputError(
            f"--layers {','.join(map(str, layout.layers))}: {sum(layout.layers)} layers in all, "
            f"but {job.facts.name} has {job.num_layers}."
        )
    counts = layout.layers or dealt_layers(job, layout.pp * layout.vpp)
    if counts is None:
        raise InputError(
            f"{dealing_words(job, layout.pp, layout.vpp)}. "
            "Give the layers of each stage with --layers, or another --pp."
        )
    return counts
