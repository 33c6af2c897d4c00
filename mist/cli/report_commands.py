"""`mist report` and `mist compare`: a plan as a page and pictures; several things in a row."""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mist.cli.command_options import (
    LAYOUT,
    OUTPUT,
    Checkpoint,
    ClusterName,
    Force,
    GlobalBatch,
    Gpu,
    GpusOfModel,
    Json,
    Margin,
    ModelOfPlan,
    Price,
    Seq,
    Trust,
)
from mist.cli.common import command, print_json, progress, typed_options
from mist.cli.outputs import (
    DRAWING_FILE,
    PAGE_FILE,
    PICTURE_FILE,
    PLAN_SUFFIXES,
    STEP_TRACE_FILE,
    check_output,
)
from mist.errors import InputError

if TYPE_CHECKING:
    from mist.report.plan_report import PlanReport
    from mist.report.side_by_side import ComparedSubject

LEAST_COMPARED = 2


PlanPath = Annotated[Path, typer.Argument(help="A plan file.")]
Page = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="The page [beside PLAN, .html, where no other file is asked for].",
        rich_help_panel=OUTPUT,
    ),
]
Png = Annotated[
    Path | None,
    typer.Option("--png", help="The pictures as one .png file.", rich_help_panel=OUTPUT),
]
Svg = Annotated[
    Path | None,
    typer.Option("--svg", help="The pictures as one .svg file.", rich_help_panel=OUTPUT),
]
StepTrace = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        help="One step as a .json trace for Perfetto or chrome://tracing.",
        rich_help_panel=OUTPUT,
    ),
]


@command("mist report plan.yaml --out plan.html --trace step.json")
def report(
    plan: PlanPath,
    model: ModelOfPlan = None,
    *,
    out: Page = None,
    png: Png = None,
    svg: Svg = None,
    trace: StepTrace = None,
    price: Price = None,
    margin: Margin = None,
    trust: Trust = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write PLAN as one page that opens from disk, with pictures of its time and memory."""
    if not (out or png or svg or trace):
        out = plan.with_suffix(".html")
    asked = (
        ("--out", out, PAGE_FILE, _page),
        ("--png", png, PICTURE_FILE, _png),
        ("--svg", svg, DRAWING_FILE, _svg),
        ("--trace", trace, STEP_TRACE_FILE, _trace),
    )
    for option, path, kind, _ in asked:
        check_output(option, path, kind, inputs=[plan, model], force=force)
    from mist.files import write_bytes
    from mist.workflow.plan_model import ModelAccess
    from mist.workflow.reporting import report_of

    with redirect_stdout(sys.stderr):  # what the model's file prints is no result
        shown = report_of(
            plan,
            margin_ratio=margin,
            price=price,
            access=ModelAccess(model=model, trust=trust),
            progress=progress,
        )
    paths = []
    for _, path, _, content in asked:
        if path is not None:
            write_bytes(path, content(shown))
            paths.append(str(path))
    _say(shown, paths, as_json=as_json)


def _say(shown: "PlanReport", paths: list[str], *, as_json: bool) -> None:
    from mist.report.plan_screen import verdict_lines
    from mist.report.tables import say

    if as_json:
        return print_json("mist.report/1", {"files": paths, "verdict": verdict_lines(shown.sheet)})
    for line in verdict_lines(shown.sheet):
        say(line)
    return say(f"Wrote {' and '.join(paths)}.")


def _page(shown: "PlanReport") -> bytes:
    from mist.report.html_page import page_of

    return page_of(shown).encode()


def _png(shown: "PlanReport") -> bytes:
    from mist.report.html_page import pictures_of
    from mist.report.picture_files import pictures_png

    return pictures_png(pictures_of(shown))


def _svg(shown: "PlanReport") -> bytes:
    from mist.report.html_page import pictures_of
    from mist.report.picture_files import pictures_svg

    return pictures_svg(pictures_of(shown))


def _trace(shown: "PlanReport") -> bytes:
    from mist.report.chrome_trace import trace_of

    assert shown.judgement is not None, "a plan file is judged for its report"
    return json.dumps(trace_of(shown.plan, shown.judgement.paces), allow_nan=False).encode()


@command("mist compare plan.yaml run.json")
def compare(
    context: typer.Context,
    files: Annotated[
        list[Path],
        typer.Argument(help="Plan files, files that mist check reads, logs of runs (.json)."),
    ],
    *,
    model: Annotated[
        str | None,
        typer.Option("--model", help="The model of configurations.", rich_help_panel=LAYOUT),
    ] = None,
    gpus: GpusOfModel = None,
    gpu: Gpu = None,
    cluster: ClusterName = None,
    seq: Seq = None,
    global_batch: GlobalBatch = 256,
    micro_batch: Annotated[
        int,
        typer.Option(
            "--micro-batch", help="Samples per rank and micro-step.", rich_help_panel=LAYOUT
        ),
    ] = 1,
    checkpoint: Checkpoint = "none",
    as_json: Json = False,
) -> None:
    """Set plans, configurations and logs of runs side by side; a plan and its log figure by figure.

    Options say what configurations leave open.
    """
    from mist.workflow.checking import HandLayout
    from mist.workflow.comparing import LeftOpen, subjects_of
    from mist.workflow.request import Question

    if len(files) < LEAST_COMPARED:
        raise InputError(f"mist compare {files[0]}: with what? Give two files or more.")
    first, *others = files
    if len(others) == 1 and not _is_log(first) and _is_log(others[0]):
        return _show_run(first, others[0], as_json=as_json)
    question = Question(
        model=model or "",
        num_gpus=gpus or 1,
        gpu=gpu,
        cluster=cluster,
        seq_len=seq,
        global_batch=global_batch,
    )
    layout = HandLayout(checkpoint=checkpoint, micro_batch=micro_batch)
    with redirect_stdout(sys.stderr):  # what the model's file prints is no result
        open_ = LeftOpen(question=question, layout=layout, typed=typed_options(context))
        columns = subjects_of(files, open_, progress)
    return _show_columns(columns, as_json=as_json)


def _is_log(path: Path) -> bool:
    """Whether a file is taken for the log of a run: it is neither a plan nor a configuration."""
    from mist.workflow.foreign_files import foreign_file

    return path.suffix not in PLAN_SUFFIXES and foreign_file(str(path)) is None


def _show_columns(columns: "tuple[ComparedSubject, ...]", *, as_json: bool) -> None:
    from mist.report.side_by_side import print_side_by_side, side_by_side_json

    if as_json:
        print_json("mist.compare/1", side_by_side_json(columns))
    else:
        print_side_by_side(columns)


def _show_run(plan: Path, log: Path, *, as_json: bool) -> None:
    """What a plan predicted beside what its run measured."""
    from mist.report.comparison_tables import compared_json, print_compared
    from mist.workflow.comparing import compare as set_beside

    found = set_beside(plan, log)
    if as_json:
        print_json("mist.compare-run/1", compared_json(found))
    else:
        print_compared(found)
