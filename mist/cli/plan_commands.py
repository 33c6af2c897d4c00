"""`mist plan` and `mist check`."""

import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mist.cli.command_options import (
    AttentionName,
    Checkpoint,
    ClusterName,
    ClusterNames,
    Details,
    Explain,
    Figures,
    Fixed,
    Forbid,
    Force,
    GlobalBatch,
    Gpu,
    Gpus,
    GpusOfModel,
    HeadName,
    HostMemory,
    Images,
    Json,
    LayerSplit,
    Margin,
    Model,
    ModelOfPlan,
    Most,
    ObjectiveName,
    Offloads,
    Out,
    PrecisionName,
    Price,
    RuntimeName,
    ScheduleName,
    Seq,
    SolverName,
    Space,
    Subject,
    TimeLimit,
    Tokens,
    Tolerance,
    Top,
    Trust,
    Verify,
    with_knobs,
)
from mist.cli.common import command, print_json, progress, typed_options
from mist.cli.hand_layouts import hand_layout
from mist.cli.outputs import PICTURE_FILE, PLAN_FILE, PLAN_SUFFIXES, check_here, check_output
from mist.errors import InputError, OutputError
from mist.files import is_file
from mist.plans.objectives import OBJECTIVES, Objective
from mist.plans.schedules import DEFAULT_KIND
from mist.plans.search_space import DEFAULT, SearchSpace, narrowed, space_of
from mist.plans.workload import Attention, HeadMode, Precision, Solver

if TYPE_CHECKING:
    from mist.report.explanation import Explanation
    from mist.workflow.checking import Checked
    from mist.workflow.cluster_choice import Offer, Rented
    from mist.workflow.planning import Effort
    from mist.workflow.request import Question
    from mist.workflow.verifying import Verified

# What `mist check PLAN` may be told.
OF_ANY_PLAN = {
    "subject", "model", "trust", "force", "margin", "host_memory", "figures", "out", "details",
    "as_json",
}  # fmt: skip


@command("mist plan examples/my_transformer.py --gpus 8 --set tp=2 --out plan.yaml")
def plan(
    model: Model,
    *,
    gpus: Gpus,
    gpu: Gpu = None,
    cluster: ClusterNames = None,
    objective: ObjectiveName = Objective.THROUGHPUT,
    tolerance: Tolerance = 0.03,
    price: Price = None,
    tokens: Tokens = None,
    runtime: RuntimeName = "torch",
    seq: Seq = None,
    images: Images = None,
    global_batch: GlobalBatch = 256,
    precision: PrecisionName = Precision.BF16,
    attention: AttentionName = Attention.FLASH,
    margin: Margin = None,
    host_memory: HostMemory = None,
    space: Space = DEFAULT,
    fixed: Fixed = None,
    most: Most = None,
    forbid: Forbid = None,
    solver: SolverName = Solver.BOTH,
    time_limit: TimeLimit = math.inf,
    top: Top = 5,
    verify: Verify = False,
    explain: Explain = False,
    out: Out = None,
    force: Force = False,
    details: Details = False,
    as_json: Json = False,
) -> None:
    """Search the best way to train MODEL that fits; write plan.yaml and a Pareto plot."""
    from mist.platform.overrides import knobs_and_figures
    from mist.workflow.cluster_choice import offer_of
    from mist.workflow.request import Question, figures_of

    writing = _checked_writing(out, (model, *(cluster or "").split(",")), force=force)
    _check_explain(objective, explain=explain)
    offer = offer_of(gpus, cluster, price, tokens)
    knobs, figures = knobs_and_figures(fixed or ())
    question = Question(
        model=model, num_gpus=1, gpu=gpu, runtime=runtime, seq_len=seq, images=images,
        global_batch=global_batch, precision=precision, attention=attention, margin_ratio=margin,
        overrides=figures_of(figures, host_memory),
    )  # fmt: skip
    narrow = partial(narrowed, fixed=knobs, most=most or (), forbid=forbid or ())
    allowed = narrow(space_of(space))
    effort = _effort(objective, tolerance, solver, top, time_limit)
    search = partial(_rented, question, offer, allowed, effort)
    rented, verified = _searched(search, margin, verify=verify)
    known = _explained(replace(question, cluster=cluster), rented, allowed, narrow, explain=explain)
    show = partial(_show_plan, rented, verified, known, tokens, as_json=as_json, details=details)
    _deliver(rented, known, writing, show)


def _checked_writing(out: Path | None, inputs: tuple[str, ...], *, force: bool) -> "_Writing":
    """Where the plan goes, refused before the work is done."""
    writing = _Writing(out=out, inputs=inputs, force=force)
    writing.check()
    return writing


def _check_explain(objective: Objective, *, explain: bool) -> None:
    """Refuse to explain a plan whose objective is not its speed."""
    if explain and OBJECTIVES[objective].least_memory:
        raise InputError(
            f"--explain with --objective {objective}: gains are those of the fastest plan. Leave "
            "out one of them."
        )


def _rented(
    question: "Question",
    offer: "Offer",
    space: SearchSpace,
    effort: "Effort",
    margin_ratio: float | None,
) -> "Rented":
    from mist.workflow.cluster_choice import rent

    return rent(replace(question, margin_ratio=margin_ratio), offer, space, effort)


def _effort(
    objective: Objective, tolerance_ratio: float, solver: Solver, top: int, time_limit: float
) -> "Effort":
    from mist.workflow.planning import Effort

    return Effort(
        objective=objective,
        tolerance_ratio=tolerance_ratio,
        num_alternatives=top,
        progress=progress,
        time_limit_s=time_limit,
        method=solver.value,
    )


def _searched(
    search: Callable[[float | None], "Rented"], margin_ratio: float | None, *, verify: bool
) -> "tuple[Rented, Verified | None]":
    with redirect_stdout(sys.stderr):  # what the model's file prints is no result
        if not verify:
            return search(margin_ratio), None
        from mist.workflow.verifying import until_it_fits

        return until_it_fits(search, margin_ratio, progress)


def _explained(
    question: "Question",
    rented: "Rented",
    space: SearchSpace,
    narrow: Callable[[SearchSpace], SearchSpace],
    *,
    explain: bool,
) -> "Explanation | None":
    """Of the candidate that was chosen; `question`: with the clusters as they were typed."""
    if not explain:
        return None
    from mist.workflow.explaining import explanation

    chosen = rented.planned.plan.cluster
    cluster = chosen.name if "," in (question.cluster or "") else question.cluster
    asked = replace(question, num_gpus=chosen.num_gpus, cluster=cluster)
    with redirect_stdout(sys.stderr):  # what the model's file prints is no result
        return explanation(asked, rented.planned, space, narrow, progress)


def _show_plan(
    rented: "Rented",
    verified: "Verified | None",
    explained: "Explanation | None",
    tokens: float | None,
    files: Sequence[str],
    *,
    as_json: bool,
    details: bool,
) -> None:
    from mist.report.explanation import explanation_json, print_explanation
    from mist.report.gpu_count_tables import candidates_json, cost_words, print_candidates
    from mist.report.plan_screen import Sheet, print_sheet
    from mist.report.plan_tables import plan_json

    planned, candidates, index = rented.planned, rented.candidates, rented.index
    if as_json:
        if files:
            progress(f"wrote {' and '.join(files)}")
        curve = candidates_json(candidates, index, tokens)
        found = plan_json(planned.plan, planned.seconds, planned.host, planned.notes)
        more = {"explanation": explanation_json(explained)} if explained else {}
        print_json("mist.plan/1", {**found, "candidates": curve, **more})
        return
    if verified is not None:
        from mist.report.verified import print_verified
        from mist.workflow.verifying import UNSEEN

        print_verified(verified.stages, UNSEEN)
    if len(candidates) > 1 or tokens is not None:
        print_candidates(candidates, index, tokens)
    sheet = Sheet(
        plan=planned.plan,
        limits=planned.limits,
        host=planned.host,
        notes=planned.notes,
        files=files,
        cost=cost_words(candidates[index]),
    )
    print_sheet(sheet, details=details)
    if explained is not None:
        print_explanation(planned.plan, explained)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Writing:
    """Where the plan goes (None: a file in the current folder, named by the plan)."""

    out: Path | None
    inputs: tuple[str, ...]
    force: bool

    def check(self) -> None:
        """Refuse before the work is done, not after it."""
        if self.out is None:
            return check_here()
        self.check_files(self.out, [])  # a name without an ending has no picture beside it
        return self.check_files(self.out, [self.out.with_suffix(".png")])

    def check_files(self, plan_path: Path, pictures: Iterable[Path]) -> None:
        """Refuse the plan or a picture where another file lies."""
        check_output("--out", plan_path, PLAN_FILE, inputs=self.inputs, force=self.force)
        for path in pictures:
            check_output("--out", path, PICTURE_FILE, inputs=self.inputs, force=self.force)


def _deliver(
    rented: "Rented",
    explained: "Explanation | None",
    writing: _Writing,
    show: Callable[[Sequence[str]], None],
) -> None:
    """Write the plan and show it; where it cannot be written, the search was not in vain."""
    try:
        files = _write_plan(rented, explained, writing)
    except OutputError:
        show([])
        raise
    show(files)


def _write_plan(rented: "Rented", explained: "Explanation | None", writing: _Writing) -> list[str]:
    """The plan and its pictures, beside each other; their names."""
    from mist.files import write_bytes
    from mist.plans.file import save_plan
    from mist.report.curve import curve_png
    from mist.report.explanation import explanation_pictures
    from mist.report.picture_files import pictures_png
    from mist.report.plot import plot_png

    planned, plan = rented.planned, rented.planned.plan
    path = writing.out or Path(
        f"{_file_name(plan.model.name)}-{plan.cluster.num_gpus}x{plan.cluster.device}.yaml"
    )
    picture = plot_png(plan, planned.points, planned.limits.device_bytes)
    pictures = {path.with_suffix(".png"): picture}
    if len(rented.candidates) > 1:
        curve = curve_png(plan.model.name, rented.candidates, rented.index)
        pictures[path.with_name(f"{path.stem}-candidates.png")] = curve
    if explained is not None:
        bars = pictures_png(explanation_pictures(explained))
        pictures[path.with_name(f"{path.stem}-explained.png")] = bars
    writing.check_files(path, pictures)
    save_plan(plan, path)
    for name, content in pictures.items():
        write_bytes(name, content)
    return [str(name) for name in (path, *pictures)]


@command("mist check examples/my_transformer.py --gpus 8 --tp 2 --zero 1")
@with_knobs
def check(
    context: typer.Context,
    subject: Subject,
    model: ModelOfPlan = None,
    *,
    gpus: GpusOfModel = None,
    checkpoint: Checkpoint = "none",
    head: HeadName = HeadMode.NONE,
    offload: Offloads = None,
    schedule: ScheduleName = DEFAULT_KIND,
    layers: LayerSplit = "",
    gpu: Gpu = None,
    cluster: ClusterName = None,
    runtime: RuntimeName = "torch",
    seq: Seq = None,
    images: Images = None,
    global_batch: GlobalBatch = 256,
    precision: PrecisionName = Precision.BF16,
    attention: AttentionName = Attention.FLASH,
    margin: Margin = None,
    host_memory: HostMemory = None,
    figures: Figures = None,
    out: Out = None,
    trust: Trust = False,
    force: Force = False,
    details: Details = False,
    as_json: Json = False,
    **knobs: int,
) -> None:
    """Judge a plan file, a layout or another framework's file: does it fit, how fast is it?"""
    from mist.workflow.checking import check_layout
    from mist.workflow.foreign_files import check_file, foreign_file

    check_output("--out", out, PLAN_FILE, inputs=[subject, model], force=force)
    file = foreign_file(subject)
    if file is None and subject.endswith(PLAN_SUFFIXES):
        return _show_check(_of_file(context, subject), out, as_json=as_json, details=details)
    # The options of a layout are read from the context, as in `mist calibrate`.
    question, layout = hand_layout(
        context.params,
        model=(model or subject) if file else subject,
        num_gpus=(gpus or 1) if file else _given_gpus(subject, model, gpus),
    )
    judge = partial(check_layout, question, layout)
    if file is not None:
        judge = partial(check_file, file, question, layout, typed_options(context))
    return _show_check(judge, out, as_json=as_json, details=details)


def _given_gpus(subject: str, model: str | None, gpus: int | None) -> int:
    """The number of GPUs of a layout of `subject`, behind which no other model may stand."""
    if model is not None and Path(subject).suffix and not is_file(subject):
        raise InputError(f"mist check {subject}: there is no such file.")
    if model is not None:
        raise InputError(f"mist check {subject} {model}: a second model. Give one of them.")
    if gpus is None:
        raise InputError(f"mist check {subject}: a model needs --gpus.")
    return gpus


def _of_file(context: typer.Context, path: str) -> Callable[..., "Checked"]:
    """What judges a plan file, under the margin and figures that it was made for unless given."""
    from mist.workflow.checking import check_plan
    from mist.workflow.plan_model import ModelAccess
    from mist.workflow.request import figures_of

    _refuse_ignored(context, path)
    said = context.params
    return partial(
        check_plan,
        path,
        margin_ratio=said["margin"],
        overrides=figures_of(said["figures"] or (), said["host_memory"]),
        access=ModelAccess(model=said["model"], trust=said["trust"]),
    )


def _refuse_ignored(context: typer.Context, subject: str) -> None:
    """Options that a plan file answers itself: they would be ignored."""
    given = [
        f"--{name.replace('_', '-')}" for name in typed_options(context) if name not in OF_ANY_PLAN
    ]
    if given:
        raise InputError(
            f"mist check {subject}: the plan file says itself what {', '.join(given)} would. "
            "Leave them out, or give the model instead of the plan."
        )


def _show_check(
    judge: Callable[..., "Checked"], out: Path | None, *, as_json: bool, details: bool
) -> None:
    from mist.plans.file import save_plan
    from mist.report.plan_screen import Sheet, print_sheet
    from mist.report.plan_tables import check_json

    with redirect_stdout(sys.stderr):  # what the model's file prints is no result
        checked = judge(progress=progress)
    if out is not None:
        save_plan(checked.plan, out)
    if as_json:
        if out is not None:
            progress(f"wrote {out}")
        print_json(
            "mist.check/1", check_json(checked.plan, checked.limits, checked.host, checked.notes)
        )
    else:
        sheet = Sheet(
            plan=checked.plan,
            limits=checked.limits,
            host=checked.host,
            notes=checked.notes,
            suggestions=checked.suggestions,
            files=[str(out)] if out else [],
        )
        print_sheet(sheet, details=details)
    if not checked.fits:
        raise SystemExit(3)


def _file_name(model: str) -> str:
    """A model's name as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", model).strip("-.") or "model"
