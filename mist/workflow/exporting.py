"""`mist export PLAN --to TARGET`: a plan as the files of a target, and judged as it runs them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mist.errors import InputError, PlanError
from mist.export.rounding import expressible, refusals_of
from mist.export.target import ExportLoss, ExportSource, Target
from mist.plans.file import load_plan
from mist.plans.plan import Plan
from mist.symbolic.estimate import estimate
from mist.symbolic.load_programs import Progress, quiet
from mist.trace import ConfigSource, resolve
from mist.workflow.checking import Checked, question_of
from mist.workflow.plan_against_job import plan_against
from mist.workflow.plan_model import UNDER_HERE, ModelAccess, model_of
from mist.workflow.request import Question, host_need, limits_of, notes_of, prepare


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedPlan:
    """Files of a target by name, what was lost, and the exported layout as that target runs it.

    `judged`: None where no runtime of the target predicts the layout; `unjudged` then says why.
    """

    target: str
    files: Mapping[str, str]
    losses: tuple[ExportLoss, ...]
    judged: Checked | None
    unjudged: str = ""


def export_plan(
    path: str | Path,
    target: Target,
    *,
    margin_ratio: float | None = None,
    access: ModelAccess = UNDER_HERE,
    progress: Progress = quiet,
) -> ExportedPlan:
    """Write a plan as text of a target's files, and judge what they say.

    Raises InputError with every field that the target cannot express, PlanError for a broken plan.
    """
    plan = load_plan(path)
    fitting, losses = _fitting(plan, target, path)
    source = model_of(plan, Path(path), access, progress)
    written = target.write(ExportSource(plan=fitting, path=str(path), config=_config(source)))
    question = question_of(plan, Path(path), source, margin_ratio)
    judged, unjudged = _judged(fitting, target, question, progress)
    return ExportedPlan(
        target=target.name,
        files=written.files,
        losses=(*losses, *written.added),
        judged=judged,
        unjudged=unjudged,
    )


def _fitting(plan: Plan, target: Target, path: str | Path) -> tuple[Plan, tuple[ExportLoss, ...]]:
    """The plan that the target can express. Raises InputError."""
    if target.expresses is None:
        if plan.runtime != "torch":
            raise InputError(
                f"mist export {path} --to {target.name}: mist apply runs plans of runtime torch, "
                f"this one is for {plan.runtime}."
            )
        return plan, ()
    fitting, losses = expressible(plan, target.name, target.expresses)
    if refusals := refusals_of(losses):
        lines = "".join(f"\n  {loss}" for loss in refusals)
        raise InputError(
            f"mist export {path} --to {target.name}: nothing is written, because files of "
            f"{target.name} cannot say all of the plan:{lines}\n"
            f"Plan for it: mist plan --runtime {target.runtimes[0]}{_limits(target)}."
        )
    return fitting, losses


def _limits(target: Target) -> str:
    """Options that keep a search within what files of a target say."""
    pipelines = target.expresses is not None and target.expresses.schedules
    return "" if pipelines else " --set pp=1 --forbid offload"


def _config(source: str) -> Mapping[str, Any]:
    """The Hugging Face configuration of a model; of a Python file none."""
    found = resolve(source)
    return found.config if isinstance(found, ConfigSource) else {}


def _judged(
    plan: Plan, target: Target, question: Question, progress: Progress
) -> tuple[Checked | None, str]:
    """The prediction of the first runtime that can do the layout, or why there is none."""
    reasons = []
    for runtime in target.runtimes or (plan.runtime,):
        try:
            return _judged_as(runtime, plan, question, progress), ""
        except InputError as error:
            reasons.append(f"runtime {runtime}: {error}")
    return None, "\n".join(reasons)


def _judged_as(runtime: str, plan: Plan, question: Question, progress: Progress) -> Checked:
    asked = replace(question, runtime=runtime)
    job = prepare(asked, progress)
    sharded = job.platform.runtime.knobs.sequence_parallel
    stages = tuple(replace(stage, sp=sharded and stage.tp > 1) for stage in plan.stages)
    exported = replace(plan, stages=stages, runtime=runtime)
    if faults := plan_against(exported, job):
        raise PlanError("the exported plan", faults)
    judged, limits = estimate(job, exported.layout), limits_of(job, asked)
    return Checked(
        plan=replace(exported, estimate=judged),
        limits=limits,
        host=host_need(job, exported.layout, judged, limits),
        notes=tuple(notes_of(job)),
        suggestions=(),
    )
