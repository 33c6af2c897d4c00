"""`mist apply`, and what is learnt from runs: `mist calibrate` and `mist validate`."""

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from mist.cli.command_options import Force, Json, ModelOfPlan, Trust
from mist.cli.common import command, print_json, progress
from mist.cli.hand_layouts import run_by_hand
from mist.cli.outputs import (
    CALIBRATION_FILE,
    LOG_FILE,
    MACHINE_FILE,
    PICTURE_FILE,
    PREDICTIONS_FILE,
    check_output,
    made_folder,
)
from mist.errors import InputError


@command("mist verify plan.yaml")
def verify(
    subject: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")],
    model: ModelOfPlan = None,
    *,
    picture: Annotated[
        Path | None, typer.Option("--timeline", help="Write live bytes over the step (.png).")
    ] = None,
    trust: Trust = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Dry-run one rank of every stage of PLAN here: real peak, real collectives, no GPU."""
    from mist.files import write_bytes
    from mist.report.verified import print_verified, timeline_png, verified_json
    from mist.workflow.plan_model import ModelAccess
    from mist.workflow.verifying import UNSEEN, verify_file

    check_output("--timeline", picture, PICTURE_FILE, inputs=[subject, model], force=force)
    with redirect_stdout(sys.stderr):
        found = verify_file(subject, progress, ModelAccess(model=model, trust=trust))
    if picture is not None:
        write_bytes(picture, timeline_png(found.stages))
        progress(f"wrote {picture}")
    if as_json:
        print_json(
            "mist.verify/1", verified_json(found.stages, fits=found.fits, agrees=found.agrees)
        )
    else:
        print_verified(found.stages, UNSEEN)
    if not found.fits:
        raise SystemExit(3)
    if not found.agrees:
        raise SystemExit(4)


@command("mist apply plan.yaml --steps 10 --log run.json")
def apply(
    subject: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")],
    model: ModelOfPlan = None,
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
    weights: Annotated[
        Path | None,
        typer.Option("--weights", help="Folder of safetensors [beside config.json, if any]."),
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Draw weights from the seed, read none.")
    ] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", help="Seconds until a stuck collective fails.")
    ] = 600.0,
    trust: Trust = False,
    force: Force = False,
) -> None:
    """Train as PLAN says: on this machine, or as one rank of torchrun."""
    from mist.exec import RunOptions
    from mist.workflow.applying import apply_plan
    from mist.workflow.plan_model import ModelAccess

    if os.environ.get("RANK", "0") == "0":  # other ranks of torchrun write none
        check_output("--log", log, LOG_FILE, inputs=[subject, model, data], force=force)

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
        weights=str(weights) if weights else None,
        from_scratch=from_scratch,
        timeout_s=timeout,
    )
    with redirect_stdout(sys.stderr):
        apply_plan(subject, options, progress, ModelAccess(model=model, trust=trust))


@command("mist profile --device cpu --out local.yaml")
def profile(
    *,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda [what mist apply uses].")] = (
        "auto"
    ),
    ranks: Annotated[
        int | None, typer.Option("--ranks", help="Ranks at once [all there is room for, of 2^k].")
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", help="About how long to measure.")] = 75.0,
    out: Annotated[Path, typer.Option("--out", help="Profile to write (.yaml).")] = Path(
        "local.yaml"
    ),
    force: Force = False,
) -> None:
    """Measure this machine into a profile: mist plan MODEL --gpus N --cluster ./local.yaml."""
    from mist.exec.profiling import Request, local_ranks, num_gpus
    from mist.files import write_text
    from mist.platform.machine import dump_machine
    from mist.report.costs import print_machine
    from mist.workflow.machine_profile import num_places
    from mist.workflow.machine_profile import profile as measure

    check_output("--out", out, MACHINE_FILE, force=force)
    if device == "auto":
        device = "cuda" if num_gpus() else "cpu"
    at_once = ranks or local_ranks() or num_places(device)
    request = Request(device=device, num_ranks=at_once, seconds=seconds)
    with redirect_stdout(sys.stderr):
        machine = measure(request, out.stem, progress)
    if machine is None:  # the first rank of torchrun writes it
        return
    write_text(out, dump_machine(machine))
    print_machine(machine)
    print(f"wrote {out}: plan for it with --cluster ./{out.name} --gpus {request.num_ranks}")


@command("mist calibrate plan.yaml run.json --out mine.yaml")
def calibrate(
    files: Annotated[
        list[str],
        typer.Argument(
            help="RUN LOG pairs. RUN: a plan file, or the words of mist check in quotes "
            '("llama3-8b --gpus 8 --zero 3"). LOG: of mist apply, torchtitan, Megatron-LM, '
            "nanotron, a Trainer's state (.json), or a table of step times (.csv)."
        ),
    ],
    *,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to write what was fitted (.yaml).")
    ] = None,
    trust: Trust = False,
    force: Force = False,
) -> None:
    """Fit a few constants of the profiles to your own measured runs, for the plans to come."""
    from mist.files import write_text
    from mist.platform.calibration import dump_calibration
    from mist.platform.profiles import user_folder
    from mist.report.costs import print_calibration
    from mist.workflow.calibrating import calibrate as fit
    from mist.workflow.plan_model import ModelAccess

    if len(files) % 2:
        raise InputError("mist calibrate takes pairs: RUN LOG [RUN LOG ...].")
    ran = [run_by_hand(words) if " --" in words else Path(words) for words in files[::2]]
    check_output("--out", out, CALIBRATION_FILE, inputs=files, force=force)
    folder = None if out else made_folder(user_folder() / "calibrations")
    pairs = list(zip(ran, map(Path, files[1::2]), strict=True))
    with redirect_stdout(sys.stderr):
        found = fit(pairs, progress, ModelAccess(trust=trust))
    name = f"{found.calibration.runtime}-{found.calibration.device}.yaml"
    path = folder / name if folder else out
    assert path is not None
    write_text(path, dump_calibration(found.calibration, "Written by mist calibrate."))
    print_calibration(
        found.before, found.after, found.errors_before, found.errors_after, found.lessons
    )
    print(f"wrote {path}" + ("" if out else ": plans for this runtime and GPU use it from now on"))


@command("mist validate runs.csv --out predictions.csv")
def validate(
    runs: Annotated[Path, typer.Argument(help="A CSV file of measured runs.")],
    *,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write a prediction for each run (.csv).")
    ] = None,
    stages: Annotated[
        Path | None, typer.Option("--stages", help="Layers of unequal pipeline stages (.csv).")
    ] = None,
    sources: Annotated[
        Path | None,
        typer.Option(
            "--sources",
            help="Runtime, cluster and kind of memory of sources (.yaml), over the shipped table.",
        ),
    ] = None,
    uncalibrated: Annotated[
        bool, typer.Option("--uncalibrated", help="Use no number fitted to run times.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Predict measured runs, and score the predictions for each source."""
    from mist.files import write_text
    from mist.report.validation import predictions_csv, print_scores, scores_json
    from mist.workflow.validating import validate as judged

    check_output("--out", out, PREDICTIONS_FILE, inputs=[runs, stages, sources], force=force)
    with redirect_stdout(sys.stderr):
        found = judged(runs, stages, sources, calibrated=not uncalibrated, progress=progress)
    if out is not None:
        write_text(out, predictions_csv(found.rows))
        progress(f"wrote {out}")
    if as_json:
        print_json("mist.validate/1", scores_json(found.scores))
    else:
        print_scores(found.scores, calibrated=not uncalibrated)
