"""Command line: parse, call, print. Results on stdout, progress and errors on stderr."""

import json
import math
import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from mist.errors import InputError, MistError, OutputError
from mist.options import (
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
from mist.spaces import narrowed, space_of
from mist.spec import Attention, Precision, ScheduleKind, Solver

if TYPE_CHECKING:
    from mist.trace import Setting
    from mist.workflow.checking import Checked
    from mist.workflow.planning import Planned

app = typer.Typer(
    name="mist",
    help="Plan how to train a PyTorch model on a cluster: "
    "parallelism, memory and schedule together.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


OF_ANY_PLAN = {"subject", "margin", "out", "as_json"}  # what `mist check PLAN` may be told
PLAN_SUFFIXES = (".yaml", ".yml")
INTERRUPTED = 130  # exit code of typer, and of shells, after Ctrl-C


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

    _check_out(out)
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
            progress=_progress,
            time_limit_s=time_limit,
            method=solver.value,
        )
    _write_plan(planned, out)
    if as_json:
        _print_json(plan_json(planned.plan, planned.seconds, planned.notes))
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
    _progress(f"wrote {path} and {path.with_suffix('.png')}")


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
        _check_out(out)
    with redirect_stdout(sys.stderr):  # what the model's file prints is no result
        checked = judge(progress=_progress)
    if out is not None:
        save_plan(checked.plan, out)
        _progress(f"wrote {out}")
    if as_json:
        _print_json(check_json(checked.plan, checked.limits, checked.notes))
    else:
        print_check(checked.plan, checked.limits, checked.notes, checked.suggestions)
    if not checked.fits:
        raise SystemExit(3)


@app.command()
def apply(
    subject: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")],
    *,
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps.")] = 10,
    seed: Annotated[int, typer.Option("--seed", help="Of weights and data.")] = 7,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate of AdamW.")] = 3e-4,
    data: Annotated[
        Path | None, typer.Option("--data", help="Tokens: bytes of a file, or an .npy array.")
    ] = None,
    log: Annotated[Path | None, typer.Option("--log", help="Write the log (.json).")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Folder of checkpoints.")
    ] = None,
    every: Annotated[
        int, typer.Option("--every", help="Steps between checkpoints [only at the end].")
    ] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint, of any layout.")
    ] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", help="Seconds until a stuck collective fails.")
    ] = 600.0,
) -> None:
    """Train as PLAN says: on this machine, or as one rank of torchrun."""
    from mist.exec import RunOptions
    from mist.workflow.applying import apply_plan

    options = RunOptions(
        plan=str(subject),
        steps=steps,
        seed=seed,
        lr=lr,
        data=str(data) if data else None,
        log=str(log) if log else None,
        checkpoint=str(checkpoint) if checkpoint else None,
        every=every,
        resume=resume,
        timeout_s=timeout,
    )
    with redirect_stdout(sys.stderr):
        apply_plan(subject, options, _progress)


@app.command()
def trace(
    model: Model,
    *,
    at: Annotated[
        str | None, typer.Option("--at", help="Evaluate the expressions at a point: b=2,s=128,t=2.")
    ] = None,
    precision: PrecisionName = Precision.BF16,
    attention: AttentionName = Attention.FLASH,
    policy: Annotated[
        str, typer.Option("--policy", help="cuda: kernels of a GPU. cpu: of this machine.")
    ] = "cuda",
    autocast: Annotated[
        bool, typer.Option("--autocast", help="fp32 parameters under torch.autocast.")
    ] = False,
    fused_norms: Annotated[
        bool, typer.Option("--fused-norms", help="RMS norms written out run as one kernel.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Each layer runs under torch.compile.")
    ] = False,
    capacity: Annotated[
        float, typer.Option("--capacity", help="Rows of an expert over those of a balanced one.")
    ] = 1.0,
    picture: Annotated[
        Path | None, typer.Option("--graph", help="Write the operations (.svg or .txt).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what each distinct block of MODEL costs, as expressions in b, s and t."""
    from mist.report.costs import outside_trace, print_trace, trace_json
    from mist.trace import Setting, load_graph

    if picture is not None and picture.suffix not in (".svg", ".txt"):
        raise OutputError(f"--graph {picture}: write an .svg or a .txt file.")
    if policy not in ("cuda", "cpu"):
        raise InputError(f"--policy {policy} is neither cuda nor cpu.")
    point = _point(at)
    setting = Setting(
        precision=precision,
        attention=attention,
        policy="cuda" if policy == "cuda" else "cpu",
        autocast=autocast,
        fused_norms=fused_norms,
        compiled=compiled,
        capacity_ratio=capacity,
    )
    with redirect_stdout(sys.stderr):
        graph = load_graph(model, setting, progress=_progress)
        if picture is not None:
            _write_graph(model, setting, picture)
    if point and (reasons := list(outside_trace(graph, point))):
        raise InputError(f"--at {at}: {' '.join(reasons)}")
    if as_json:
        _print_json(trace_json(graph, point))
    else:
        print_trace(graph, point)


@app.command()
def validate(
    runs: Annotated[Path, typer.Argument(help="A CSV file of measured runs.")],
    *,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write a prediction for each run (.csv).")
    ] = None,
    stages: Annotated[
        Path | None, typer.Option("--stages", help="Layers of unequal pipeline stages (.csv).")
    ] = None,
    uncalibrated: Annotated[
        bool, typer.Option("--uncalibrated", help="Use no number fitted to run times.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Predict measured runs, and score the predictions for each source."""
    from mist.files import write_text
    from mist.report.validation import predictions_csv, print_scores, scores_json
    from mist.workflow.validating import validate as judged

    if out is not None and out.suffix != ".csv":
        raise OutputError(f"--out {out}: predictions are written as .csv.")
    with redirect_stdout(sys.stderr):
        found = judged(runs, stages, calibrated=not uncalibrated, progress=_progress)
    if out is not None:
        write_text(out, predictions_csv(found.rows))
        _progress(f"wrote {out}")
    if as_json:
        _print_json(scores_json(found.scores))
    else:
        print_scores(found.scores, calibrated=not uncalibrated)


@app.command()
def calibrate(
    files: Annotated[
        list[Path], typer.Argument(help="PLAN LOG pairs: plan files, each with its run's log.")
    ],
    *,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to write what was fitted (.yaml).")
    ] = None,
) -> None:
    """Fit a few constants of the profiles to your own measured runs, for the plans to come."""
    from mist.files import write_text
    from mist.platform.calibration import dump_calibration
    from mist.platform.profiles import user_folder
    from mist.report.costs import print_calibration
    from mist.workflow.calibrating import calibrate as fit

    if len(files) % 2:
        raise InputError("mist calibrate takes pairs: PLAN LOG [PLAN LOG ...].")
    if out is not None and out.suffix != ".yaml":
        raise OutputError(f"--out {out}: a calibration is written as .yaml.")
    with redirect_stdout(sys.stderr):
        found = fit(list(zip(files[::2], files[1::2], strict=True)), _progress)
    name = f"{found.calibration.runtime}-{found.calibration.device}.yaml"
    path = out or user_folder() / "calibrations" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, dump_calibration(found.calibration, "Written by mist calibrate."))
    print_calibration(found.before, found.after, found.errors_before, found.errors_after)
    print(f"wrote {path}" + ("" if out else ": plans for this runtime and GPU use it from now on"))


@app.command()
def profiles(
    action: Annotated[str, typer.Argument(help="list, or show NAME")] = "list",
    name: Annotated[str | None, typer.Argument(help="A profile to show.")] = None,
    as_json: Json = False,
) -> None:
    """List devices, clusters, runtimes and calibrations; show every number with its source."""
    from mist.platform.listing import figure_rows, profile_rows
    from mist.report.costs import print_profiles, profiles_json

    if action not in ("list", "show") or (action == "show") != (name is not None):
        raise InputError("Say `mist profiles` or `mist profiles show NAME`.")
    known = profile_rows()
    names = [row.name for row in known]
    if name is not None:
        figure_rows(name)  # refuses an unknown name with the nearest ones
        names = [name]
    shown = [(row, figure_rows(row.name)) for row in known if row.name in names]
    if as_json:
        _print_json(profiles_json(shown))
    else:
        print_profiles(shown)


def _write_graph(model: str, setting: "Setting", path: Path) -> None:
    from mist.files import write_text
    from mist.report.graph import graph_svg
    from mist.trace import load_listing

    listing = load_listing(model, setting, progress=_progress)
    write_text(path, graph_svg(listing) if path.suffix == ".svg" else listing)
    _progress(f"wrote {path}")


def _point(at: str | None) -> dict[str, int] | None:
    """--at b=2,s=128,t=2 as numbers of at least 1; t defaults to 1."""
    if at is None:
        return None
    items = at.split(",")
    pairs = dict(item.partition("=")[::2] for item in items)
    known = {"b", "s"} <= set(pairs) <= {"b", "s", "t"} and len(pairs) == len(items)
    if not known or not all(v.isdecimal() and int(v) > 0 for v in pairs.values()):
        raise InputError(f"--at {at}: expected b=2,s=128 and perhaps t=2.")
    return {"t": 1} | {name: int(value) for name, value in pairs.items()}


def _file_name(model: str) -> str:
    """A model's name as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", model).strip("-.") or "model"


def _check_out(out: Path | None) -> None:
    """Refuse before the work is done, not after it. None: a file in the current folder."""
    if out is None:
        if not os.access(".", os.W_OK):
            raise OutputError("cannot write into the current folder. Choose a file with --out.")
        return
    if out.suffix not in PLAN_SUFFIXES:
        raise OutputError(f"--out {out}: a plan file ends in .yaml.")
    if not out.parent.exists():
        raise OutputError(f"--out {out}: the folder {out.parent} does not exist. Create it first.")
    if not out.parent.is_dir():
        raise OutputError(f"--out {out}: {out.parent} is not a folder. Choose another file.")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise OutputError(f"--out {out}: cannot write there. Choose another file.")


def _progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _print_json(data: object) -> None:
    print(json.dumps(data, indent=2))


def main() -> NoReturn:
    """Run the command line; every refusal is one message and an exit code, never a traceback."""
    try:
        app()
    except MistError as error:
        print(f"mist: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("mist: interrupted. No file is half written.", file=sys.stderr)
        raise
    raise SystemExit(0)
