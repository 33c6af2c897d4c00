"""`mist report`: a plan as a page, pictures and a trace of its step."""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mist.cli.command_options import OUTPUT, Force, Json, Margin, ModelOfPlan, Price, Trust
from mist.cli.common import command, print_json, progress
from mist.cli.outputs import (
    DRAWING_FILE,
    PAGE_FILE,
    PICTURE_FILE,
    STEP_TRACE_FILE,
    check_output,
)

if TYPE_CHECKING:
    from mist.report.plan_report import PlanReport


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
        return print_json({"files": paths, "verdict": verdict_lines(shown.sheet)})
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
