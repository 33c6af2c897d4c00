"""`mist export`: a plan as the files of another framework."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mist.cli.command_options import Force, Json, Margin, ModelOfPlan, Trust
from mist.cli.common import command, print_json, progress
from mist.cli.outputs import EXPORTED_FILE, check_output, made_folder
from mist.errors import OutputError

if TYPE_CHECKING:
    from mist.workflow.exporting import ExportedPlan


@command("mist export plan.yaml --to megatron --out run")
def export(
    plan: Annotated[Path, typer.Argument(help="A plan file.")],
    model: ModelOfPlan = None,
    *,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="megatron, megatron-bridge, torchtitan, deepspeed, accelerate, llamafactory, "
            "axolotl, torchrun, slurm, kubernetes or skypilot.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the files; made if missing.")],
    margin: Margin = None,
    trust: Trust = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write PLAN as files that another framework, or a launcher, takes; say what is lost."""
    from mist.export.targets import target_named
    from mist.workflow.exporting import export_plan
    from mist.workflow.plan_model import ModelAccess

    target = target_named(to)
    access = ModelAccess(model=model, trust=trust)
    with redirect_stdout(sys.stderr):  # what the model's file prints is no result
        exported = export_plan(plan, target, margin_ratio=margin, access=access, progress=progress)
    paths = _write(exported, out, plan, force=force)
    _show(exported, paths, as_json=as_json)
    if exported.judged is not None and not exported.judged.fits:
        raise SystemExit(3)


def _write(exported: "ExportedPlan", folder: Path, plan: Path, *, force: bool) -> list[str]:
    """Write all files or, where one may not be, none. Raises OutputError."""
    from mist.files import write_text

    if folder.exists() and not folder.is_dir():
        raise OutputError(f"--out {folder} is a file. Give a folder.")
    paths = {folder / name: text for name, text in exported.files.items()}
    for parent in {path.parent for path in paths}:
        made_folder(parent)
    for path in paths:
        check_output("--out", path, EXPORTED_FILE, inputs=[plan], force=force)
    for path, text in paths.items():
        write_text(path, text)
        if path.suffix == ".sh":
            path.chmod(path.stat().st_mode | 0o100)
    return [str(path) for path in paths]


def _show(exported: "ExportedPlan", paths: list[str], *, as_json: bool) -> None:
    from mist.report.exports import export_json, print_export, verdict_words

    judged = exported.judged
    words = f"Not predicted: {exported.unjudged}"
    data: dict[str, object] = {"fits": None, "unjudged": exported.unjudged}
    if judged is not None:
        plan = judged.plan
        words = verdict_words(plan, fits=judged.fits, margin_bytes=judged.margin_bytes)
        data = {
            "fits": judged.fits,
            "runtime": plan.runtime,
            "margin_bytes": round(judged.margin_bytes),
            "step_s": plan.estimate.step_s,
        }
    if as_json:
        print_json("mist.export/1", export_json(exported.target, paths, exported.losses, data))
    else:
        print_export(exported.target, paths, exported.losses, words)
