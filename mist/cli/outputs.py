"""Where a command writes, checked before the work starts: ending, place, and what would be lost.

An output takes the place of an earlier file of its own kind: plans are planned again. A file of any
other kind is somebody's work and needs --force; an input is never written.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mist.errors import OutputError

PLAN_SUFFIXES: Final = (".yaml", ".yml")
START_BYTES: Final = 4096  # in which a file of ours can be known by its mark


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputKind:
    """What a command writes: its name, its endings, what is said of others, how it is known."""

    name: str
    endings: tuple[str, ...]
    rule: str
    marks: tuple[bytes, ...]

    def wrote(self, path: Path) -> bool:
        """Whether a file can be one that an earlier command wrote; an empty one can."""
        with path.open("rb") as file:
            start = file.read(START_BYTES)
        return not start.strip() or any(mark in start for mark in self.marks)


PLAN_FILE: Final = OutputKind(
    name="plan",
    endings=PLAN_SUFFIXES,
    rule="a plan file ends in .yaml",
    marks=(b"schema: mist.plan/",),
)
MACHINE_FILE: Final = OutputKind(
    name="measured machine",
    endings=PLAN_SUFFIXES,
    rule="a plan file ends in .yaml",
    marks=(b"schema: mist.machine/",),
)
CALIBRATION_FILE: Final = OutputKind(
    name="calibration",
    endings=(".yaml",),
    rule="a calibration is written as .yaml",
    marks=(b"schema: mist.calibration/",),
)
LOG_FILE: Final = OutputKind(
    name="log of a run", endings=(".json",), rule="a log ends in .json", marks=(b'"steps": [',)
)
PREDICTIONS_FILE: Final = OutputKind(
    name="table of predictions",
    endings=(".csv",),
    rule="predictions are written as .csv",
    marks=(b"run_id,status,reason",),
)
PICTURE_FILE: Final = OutputKind(
    name="picture of Mist",
    endings=(".png",),
    rule="a picture is written as .png",
    marks=(b"Software\0Mist",),
)
PAGE_FILE: Final = OutputKind(
    name="page of Mist",
    endings=(".html",),
    rule="the page is written as .html",
    marks=(b"written by `mist report`",),
)
DRAWING_FILE: Final = OutputKind(
    name="picture of Mist",
    endings=(".svg",),
    rule="write an .svg file",
    marks=(b"<dc:title>Mist</dc:title>",),
)
STEP_TRACE_FILE: Final = OutputKind(
    name="trace of a step",
    endings=(".json",),
    rule="a trace is written as .json",
    marks=(b'"writer": "mist report"',),
)
EXPORTED_FILE: Final = OutputKind(
    name="exported file",
    endings=(".sh", ".py", ".json", ".yaml", ".sbatch"),
    rule="exported files have the endings of their targets",
    marks=(b"`mist export`", b'"mist export"'),
)
GRAPH_FILE: Final = OutputKind(
    name="graph of operations",
    endings=(".svg", ".txt"),
    rule="write an .svg or a .txt file",
    marks=(b"text{font:11px monospace", b" phase="),
)


def check_output(
    option: str,
    path: Path | None,
    kind: OutputKind,
    *,
    inputs: Iterable[str | Path | None] = (),
    force: bool = False,
) -> None:
    """Refuse a place before the work is done, not after it. None: nothing is written.

    `option` as it is typed, "--out". `inputs`: files that the command reads; what names no file is
    no input. Raises OutputError.
    """
    if path is None:
        return
    asked = f"{option} {path}"
    if path.suffix not in kind.endings:
        raise OutputError(f"{asked}: {kind.rule}.")
    try:
        _check_place(asked, path)
        _check_loss(asked, path, kind, inputs, force=force)
    except OSError as error:  # names too long, folders that may not be read, loops of links
        raise OutputError(f"{asked}: {error.strerror}. Choose another file.") from error


def made_folder(folder: Path) -> Path:
    """A folder of Mist's own, made where it is missing. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror}. Use --out.") from error
    if not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write into {folder}. Choose a file with --out.")
    return folder


def check_here() -> None:
    """Refuse where a file cannot be written into the current folder. Raises OutputError."""
    if not os.access(".", os.W_OK):
        raise OutputError("cannot write into the current folder. Choose a file with --out.")


def _check_place(asked: str, path: Path) -> None:
    folder = path.parent
    if not folder.exists():
        raise OutputError(f"{asked}: the folder {folder} does not exist. Create it first.")
    if not folder.is_dir():
        raise OutputError(f"{asked}: {folder} is not a folder. Choose another file.")
    # Through a link the file that it names is written, in a folder of its own.
    target = Path(os.path.realpath(path))
    if target.exists() and not (target.is_file() or target.is_dir()):
        # A pipe waits for a reader, a device keeps nothing.
        raise OutputError(f"{asked} is a pipe, socket or device. Choose another file.")
    places = [target.parent, *([target] if target.exists() else [])]
    if path.is_dir() or not all(os.access(place, os.W_OK) for place in places):
        raise OutputError(f"{asked}: cannot write there. Choose another file.")


def _check_loss(
    asked: str,
    path: Path,
    kind: OutputKind,
    inputs: Iterable[str | Path | None],
    *,
    force: bool,
) -> None:
    if not path.exists():
        return
    for name in inputs:
        if name is not None and Path(name).exists() and path.samefile(name):
            raise OutputError(f"{asked} is an input of this command. Choose another file.")
    if path.is_file() and not force and not kind.wrote(path):
        raise OutputError(
            f"{asked} exists and is no {kind.name}. Choose another file, or --force to replace it."
        )
