"""`mist check`: judge a plan file or a layout written by hand, and say what would help."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mist.errors import InputError, PlanError
from mist.estimate import Job, estimate
from mist.planfile import load_plan
from mist.plans import MemoryLevel, Offload, Plan, StagePlan, even_layers
from mist.programs import Progress, quiet
from mist.rules import broken
from mist.units import format_bytes, format_seconds
from mist.workflow.matching import plan_against
from mist.workflow.question import OBJECT, Question, limit_of, prepare, unsearched_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class HandLayout:
    """A layout as a user types it, the same for all stages.

    `checkpoint`: "none", "full", or how many layers of each stage are recomputed.
    """

    tp: int = 1
    pp: int = 1
    zero: int = 0
    micro_batch: int = 1
    checkpoint: str = "none"

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "micro_batch"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} {getattr(self, name)} is not a positive number.")
        if self.zero not in range(4):
            raise InputError(f"--zero {self.zero} is not a ZeRO level (0, 1, 2 or 3).")
        if self.checkpoint not in ("none", "full") and not self.checkpoint.isdecimal():
            raise InputError(
                f"--checkpoint {self.checkpoint} is neither none, full nor a number of layers."
            )

    def num_full(self, num_layers: int) -> int:
        """Recomputed layers of a stage of `num_layers`."""
        if self.checkpoint in ("none", "full"):
            return num_layers if self.checkpoint == "full" else 0
        return min(int(self.checkpoint), num_layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A judged plan: does it fit within the limit, by how much, and what would help."""

    plan: Plan
    limit_bytes: float
    notes: tuple[str, ...]
    suggestions: tuple[str, ...]

    @property
    def peak_bytes(self) -> int:
        """Of the stage that needs most."""
        return max(stage.peak_bytes for stage in self.plan.estimate.stages)

    @property
    def margin_bytes(self) -> float:
        """What the limit leaves on the tightest stage; negative when it does not fit."""
        return self.limit_bytes - self.peak_bytes

    @property
    def fits(self) -> bool:
        """Whether every stage stays within the limit."""
        return self.margin_bytes >= 0


def check_layout(question: Question, layout: HandLayout, progress: Progress = quiet) -> Checked:
    """Judge a layout written by hand.

    Raises InputError naming every rule that it breaks.
    """
    job = prepare(question, progress)
    stages, num_micro_batches = _stages(job, layout)
    judged = estimate(job, stages, num_micro_batches)
    plan = unsearched_plan(job, question, stages, num_micro_batches, judged)
    limit_bytes = limit_of(job, question)
    checked = Checked(plan=plan, limit_bytes=limit_bytes, notes=job.facts.notes, suggestions=())
    return replace(checked, suggestions=tuple(_suggestions(job, layout, checked)))


def check_plan(
    path: str | Path, *, margin_ratio: float | None = None, progress: Progress = quiet
) -> Checked:
    """Judge a plan file again, with the profiles and the model as they are now.

    `margin_ratio`: None for the margin that the plan was made with. Raises PlanError when the file
    is broken, is a plan for another model, or asks for what is not predicted or breaks a rule.
    """
    plan = load_plan(path)
    question = question_of(plan, Path(path), margin_ratio)
    job = prepare(question, progress)
    if faults := plan_against(plan, job):
        raise PlanError(str(path), faults)
    judged = estimate(job, plan.stages, plan.num_micro_batches)
    return Checked(
        plan=replace(plan, estimate=judged),
        limit_bytes=limit_of(job, question),
        notes=tuple(_notes(plan, job)),
        suggestions=(),
    )


def question_of(plan: Plan, path: Path, margin_ratio: float | None) -> Question:
    """The question that a plan answers; its model is looked for here and beside the plan."""
    source = plan.model.source
    if source.startswith(OBJECT):
        raise InputError(
            f"{path} was planned from a module in Python, which no file names. "
            "Set model.source to a file with build_model()."
        )
    beside = path.parent / source
    workload = plan.workload
    return Question(
        model=str(beside) if beside.exists() and not Path(source).exists() else source,
        num_gpus=plan.cluster.num_gpus,
        gpu=plan.cluster.device,
        cluster=plan.cluster.name,
        runtime=plan.runtime,
        seq_len=workload.seq_len,
        global_batch=workload.global_batch,
        precision=workload.precision,
        attention=workload.attention,
        margin_ratio=_margin(plan) if margin_ratio is None else margin_ratio,
    )


def _margin(plan: Plan) -> float | None:
    """The margin that a plan was made with, if it says so."""
    margin = plan.provenance.search.get("margin")
    return float(margin) if isinstance(margin, int | float) else None


def _notes(plan: Plan, job: Job) -> Iterator[str]:
    """What the trace says, and what changed since the plan was made."""
    yield from job.facts.notes
    now = job.platform.profile_hashes()
    for name in sorted(plan.provenance.profiles):
        if now.get(name) != plan.provenance.profiles[name]:
            yield f"profile {name} has changed since the plan was made: the figures are new"


def _stages(job: Job, layout: HandLayout) -> tuple[tuple[StagePlan, ...], int]:
    """Equal stages, the first ones a layer longer where the layers do not divide."""
    num_gpus, ranks = job.platform.num_gpus, layout.tp * layout.pp
    if num_gpus % ranks:
        product = f"--tp {layout.tp} * --pp {layout.pp} = {ranks}"
        on_tp = tuple(rule for rule in job.rules if rule.name.startswith("tp-"))
        others = broken(on_tp, {"tp": layout.tp})
        raise InputError("\n".join([f"{product} does not divide the {num_gpus} GPUs.", *others]))
    dp = num_gpus // ranks
    num_micro_batches = max(job.workload.global_batch // (dp * layout.micro_batch), 1)
    columns = {
        "tp": layout.tp,
        "dp": dp,
        "micro_batch": layout.micro_batch,
        "zero": layout.zero,
        "num_stages": layout.pp,
        "num_micro_batches": num_micro_batches,
    }
    if messages := list(broken(job.rules, columns)):
        raise InputError("\n".join(messages))
    counts = even_layers(job.num_layers, layout.pp)
    return tuple(_stage(job, layout, counts, i, dp) for i in range(layout.pp)), num_micro_batches


def _stage(job: Job, layout: HandLayout, counts: Sequence[int], i: int, dp: int) -> StagePlan:
    num_full = layout.num_full(counts[i])
    return StagePlan(
        layers=((sum(counts[:i]), counts[i]),),
        devices=(i * dp * layout.tp, dp * layout.tp),
        dp=dp,
        tp=layout.tp,
        sp=layout.tp > 1 and job.platform.runtime.knobs.sequence_parallel,
        cp=1,
        ep=1,
        micro_batch=layout.micro_batch,
        zero=layout.zero,  # type: ignore[arg-type]
        head="eager",
        memory={MemoryLevel.EAGER: counts[i] - num_full, MemoryLevel.FULL: num_full},
        offload=Offload(),
    )


def _suggestions(job: Job, layout: HandLayout, checked: Checked) -> Iterator[str]:
    """Single changes that make the layout fit or, if it fits, faster; the fastest three."""
    step_s = checked.plan.estimate.step_s
    judged = []
    for words, changed in _changes(layout):
        try:
            stages, num_micro_batches = _stages(job, changed)
        except InputError:
            continue
        after = estimate(job, stages, num_micro_batches)
        peak_bytes = max(stage.peak_bytes for stage in after.stages)
        fits = peak_bytes <= checked.limit_bytes
        if fits and (not checked.fits or after.step_s < step_s):
            judged.append((after.step_s, peak_bytes, words))
    for after_s, peak_bytes, words in sorted(judged)[:3]:
        yield f"{words}: {format_seconds(after_s)} per step, peak {format_bytes(peak_bytes)}"


def _changes(layout: HandLayout) -> Iterator[tuple[str, HandLayout]]:
    """The layouts one change away."""
    for checkpoint in ("none", "full"):
        if checkpoint != layout.checkpoint:
            yield f"--checkpoint {checkpoint}", replace(layout, checkpoint=checkpoint)
    for zero in range(4):
        if zero != layout.zero:
            yield f"--zero {zero}", replace(layout, zero=zero)
    for tp in _doubled_and_halved(layout.tp):
        yield f"--tp {tp}", replace(layout, tp=tp)
    for pp in _doubled_and_halved(layout.pp):
        yield f"--pp {pp}", replace(layout, pp=pp)
    for micro_batch in _doubled_and_halved(layout.micro_batch):
        yield f"--micro-batch {micro_batch}", replace(layout, micro_batch=micro_batch)


def _doubled_and_halved(value: int) -> Iterator[int]:
    yield 2 * value
    if value > 1:
        yield value // 2
