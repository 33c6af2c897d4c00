"""`mist trace`, `mist convert` and `mist profiles`: what a plan is made from."""

import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mist.cli.command_options import (
    AttentionName,
    Force,
    Images,
    Json,
    Model,
    PrecisionName,
)
from mist.cli.common import command, print_json, progress
from mist.cli.outputs import GRAPH_FILE, check_output
from mist.errors import InputError
from mist.plans.workload import MOST_TOKENS, Attention, Precision
from mist.units import parse_whole

if TYPE_CHECKING:
    from mist.layers.masks import Masks
    from mist.trace import TraceSetting


@command("mist trace examples/llama3_8b.py --at b=1,s=2048,t=2")
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
    seq: Annotated[
        int | None, typer.Option("--seq", min=1, help="A sequence length that must be covered.")
    ] = None,
    images: Images = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show what each distinct block of MODEL costs, as expressions in b, s and t."""
    from mist.report.costs import outside_trace, print_trace, trace_json
    from mist.trace import TraceSetting, load_graph

    check_output("--graph", picture, GRAPH_FILE, inputs=[model], force=force)
    if policy not in ("cuda", "cpu"):
        raise InputError(f"--policy {policy} is neither cuda nor cpu.")
    point = _point(at)
    setting = TraceSetting(
        precision=precision, attention=attention, policy="cuda" if policy == "cuda" else "cpu",
        autocast=autocast, fused_norms=fused_norms, compiled=compiled, capacity_ratio=capacity,
        seq_len=seq or _length(point), images=images,
    )  # fmt: skip
    with redirect_stdout(sys.stderr):
        graph = load_graph(model, setting, progress=progress)
        if picture is not None:
            _write_graph(model, setting, picture)
    _refuse(f"--at {at}", outside_trace(graph, point) if point else ())
    if as_json:
        print_json("mist.trace/1", trace_json(graph, point))
    else:
        print_trace(graph, point)


@command("mist convert examples/gpt2_xl.py --level fused")
def convert(
    model: Model,
    *,
    level: Annotated[
        str,
        typer.Option(
            "--level", help="fused, drop-activation, drop-norm, norm-output or tempo: see the docs."
        ),
    ],
    masks: Annotated[
        str, typer.Option("--masks", help="What dropout keeps of an element: byte or bit.")
    ] = "byte",
    attention: AttentionName = Attention.FLASH,
    as_json: Json = False,
) -> None:
    """Show what a memory level would change in MODEL; `mist.layers.convert` does it."""
    from mist.layers.rungs import RUNGS
    from mist.report.conversions import conversion_json, print_conversion
    from mist.workflow.converting import conversion_of

    if masks not in ("byte", "bit"):
        raise InputError(f"--masks {masks} is neither byte nor bit.")
    with redirect_stdout(sys.stderr):
        kind: Masks = "bit" if masks == "bit" else "byte"
        conversion = conversion_of(model, level, kind, attention, progress)
    if as_json:
        print_json("mist.convert/1", conversion_json(conversion))
    else:
        print_conversion(conversion, RUNGS[level].meaning)


@command("mist profiles show h100-sxm")
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
        print_json("mist.profiles/1", profiles_json(shown))
    else:
        print_profiles(shown)


def _write_graph(model: str, setting: "TraceSetting", path: Path) -> None:
    from mist.files import write_text
    from mist.report.operation_graph import graph_svg
    from mist.trace import load_listing

    listing = load_listing(model, setting, progress=progress)
    write_text(path, graph_svg(listing) if path.suffix == ".svg" else listing)
    progress(f"wrote {path}")


def _length(point: dict[str, int] | None) -> int | None:
    return point["s"] if point else None


def _refuse(option: str, reasons: Iterable[str]) -> None:
    """Raise InputError for an option that there is a reason against."""
    if text := " ".join(reasons):
        raise InputError(f"{option}: {text}")


def _point(at: str | None) -> dict[str, int] | None:
    """--at b=2,s=128,t=2 as numbers of at least 1; t defaults to 1."""
    if at is None:
        return None
    words = dict(item.partition("=")[::2] for item in at.split(","))
    try:
        point = {name: parse_whole(word) for name, word in words.items()}
    except ValueError:
        point = {}
    known = {"b", "s"} <= set(point) <= {"b", "s", "t"} and len(point) == at.count(",") + 1
    if not known or not all(1 <= size <= MOST_TOKENS for size in point.values()):
        raise InputError(
            f"--at {at}: expected b=2,s=128 and perhaps t=2, numbers from 1 to {MOST_TOKENS}."
        )
    return {"t": 1} | point
