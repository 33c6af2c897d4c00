"""`mist plan` and `mist check`."""

import math
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mist.cli.common import PLAN_SUFFIXES, app, check_out, print_json, progress
from mist.cli.options import (
    AttentionName,
    Checkpoint,
    ClusterName,
    Fixed,
    Forbid,
    GlobalBatch,
    Gpu,
    Gpus,
    Json,
    Margin,
    MicroBatch,
    Model,
    Most,
    Offloads,
    Out,
    Pp,
    PrecisionName,
    RuntimeName,
    ScheduleName,
    Seq,
    SolverName,
    Space,
    TimeLimit,
    Top,
    Tp,
    Vpp,
    Zero,
)
from mist.errors import InputError
from mist.spaces import narrowed, space_of
from mist.spec import Attention, Precision, ScheduleKind, Solver

if TYPE_CHECKING:
    from mist.workflow.checking import Checked
    from mist.workflow.planning import Planned

OF_ANY_PLAN = {"subject", "margin", "out", "as_json"}  # what `mist check PLAN` may be told


@app.command()
def plan(
    model: Model,
    *,
    gpus: Gpus,
    gpu: Gpu = None,
    cluster: ClusterName = None,
    runtime: RuntimeName = "torch",
    seq: Seq = None,
    global_batch: GlobalBatch = 256,
    precision: PrecisionName = Precision.BF16,
    attention: AttentionName = Attention.FLASH,
    margin: Margin = None,
    space: Space = "mist",
    fixed: Fixed = None,
    most: Most = None,
    forbid: Forbid = None,
    solver: SolverName = Solver.BOTH,
    time_limit: TimeLimit = math.inf,
    top: Top = 5,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Search the fastest way to train MODEL that fits; write plan.yaml and a Pareto plot."""
    from mist.report.plans import plan_json, print_plan
    from mist.workflow.planning import make_plan
    from mist.workflow.question import Question

    check_out(out)
    question = Question(
        model=model,
        num_gpus=gpus,
        gpu=gpu,
        cluster=cluster,
        runtime=runtime,
        seq_len=seq,
        global_batch=global_batch,
        precision=precision,
        attention=attention,
        margin_ratio=margin,
    )
    allowed = narrowed(space_of(space), fixed=fixed or (), most=most or (), forbid=forbid or ())
    with redirect_stdout(sys.stderr):  # what the model's file prints is no result
        planned = make_plan(
            question,
            allowed,
            num_alternatives=top,
            progress=progress,
            time_limit_s=time_limit,
            method=solver.value,
        )
    _write_plan(planned, out)
    if as_json:
        print_json(plan_json(planned.plan, planned.seconds, planned.notes))
    else:
        print_plan(planned.plan, planned.limits, planned.notes)


def _write_plan(planned: "Planned", out: Path | None) -> None:
    """The plan and its picture, beside each other."""
    from mist.files import write_bytes
    from mist.planfile import save_plan
    from mist.report.plot import plot_png

    plan = planned.plan
    path = out or Path(
        f"{_file_name(plan.model.name)}-{plan.cluster.num_gpus}x{plan.cluster.device}.yaml"
    )
    picture = plot_png(plan, planned.points, planned.limits.device_bytes)
    save_plan(plan, path)
    write_bytes(path.with_suffix(".png"), picture)
    progress(f"wrote {path} and {path.with_suffix('.png')}")


@app.command()
def check(
    context: typer.Context,
    subject: Annotated[
        str, typer.Argument(help="A plan file, or a model to judge with --tp, --pp, ...")
    ],
    *,
    gpus: Annotated[
        int | None, typer.Option("--gpus", help="Number of GPUs (for a model).")
    ] = None,
    tp: Tp = 1,
    pp: Pp = 1,
    zero: Zero = 0,
    micro_batch: MicroBatch = 1,
    checkpoint: Checkpoint = "none",
    offload: Offloads = None,
    schedule: ScheduleName = ScheduleKind.ONE_F_ONE_B,
    vpp: Vpp = 1,
    gpu: Gpu = None,
    cluster: ClusterName = None,
    runtime: RuntimeName = "torch",
    seq: Seq = None,
    global_batch: GlobalBatch = 256,
    precision: PrecisionName = Precision.BF16,
    attention: AttentionName = Attention.FLASH,
    margin: Margin = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Judge a plan file or a layout of your own: does it fit, how fast is it, where does it go."""
    from mist.workflow.checking import HandLayout, check_layout, check_plan, offload_of
    from mist.workflow.question import Question

    if subject.endswith(PLAN_SUFFIXES):
        _refuse_ignored(context, subject)
        return _show_check(partial(check_plan, subject, margin_ratio=margin), out, as_json=as_json)
    if gpus is None:
        raise InputError(f"mist check {subject}: a model needs --gpus.")
    question = Question(
        model=subject,
        num_gpus=gpus,
        gpu=gpu,
        cluster=cluster,
        runtime=runtime,
        seq_len=seq,
        global_batch=global_batch,
        precision=precision,
        attention=attention,
        margin_ratio=margin,
    )
    layout = HandLayout(
        tp=tp,
        pp=pp,
        zero=zero,
        micro_batch=micro_batch,
        checkpoint=checkpoint,
        schedule=schedule,
        vpp=vpp,
        offload=offload_of(offload or ()),
    )
    return _show_check(partial(check_layout, question, layout), out, as_json=as_json)


def _refuse_ignored(context: typer.Context, subject: str) -> None:
    """Options that a plan file answers itself: they would be ignored."""
    given = [
        f"--{name.replace('_', '-')}"
        for name in context.params
        if name not in OF_ANY_PLAN
        and (source := context.get_parameter_source(name)) is not None
        and source.name == "COMMANDLINE"
    ]
    if given:
        raise InputError(
            f"mist check {subject}: the plan file says itself what {', '.join(given)} would. "
            "Leave them out, or give the model instead of the plan."
        )


def _show_check(judge: Callable[..., "Checked"], out: Path | None, *, as_json: bool) -> None:
    from mist.planfile import save_plan
    from mist.report.plans import check_json, print_check

    if out is not None:
        check_out(out)
    with redirect_stdout(sys.stderr):  # what the model's file prints is no result
        checked = judge(progress=progress)
    if out is not None:
        save_plan(checked.plan, out)
        progress(f"wrote {out}")
    if as_json:
        print_json(check_json(checked.plan, checked.limits, checked.notes))
    else:
        print_check(checked.plan, checked.limits, checked.notes, checked.suggestions)
    if not checked.fits:
        raise SystemExit(3)


def _file_name(model: str) -> str:
    """A model's name as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", model).strip("-.") or "model"
