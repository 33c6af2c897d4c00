"""The folder of a run's checkpoints: what lies in it, and who may write into it. Torch-free.

A checkpoint is a folder step-N with the file mist.json, which is there only when all of it is.
"Last" is what was written last (`order` counts), whatever the number of its step. One run at a time
holds the lock, which the system gives back when the run's processes are gone, however they ended.
"""

import fcntl
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mist.documents import read_json
from mist.errors import InputError, OutputError
from mist.files import is_file

NAME: Final = re.compile(r"step-(\d+)")
FACTS: Final = "mist.json"
LOCK: Final = ".lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint: `step` steps are done; `facts`: of the run that wrote it."""

    path: Path
    step: int
    facts: Mapping[str, Any]

    @property
    def order(self) -> tuple[int, int]:
        """The order of writing; checkpoints of earlier versions are ordered by step alone."""
        return self.facts.get("order", 0), self.step


def checkpoints(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints of a folder, in the order of writing. Raises InputError."""
    paths = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(map(_read, filter(_ours, paths)), key=lambda each: each.order)


def _ours(path: Path) -> bool:
    return is_file(path / FACTS)


def _read(path: Path) -> Checkpoint:
    try:
        facts: Any = read_json(path / FACTS)
        step, order = facts["step"], facts.get("order", 0)
        if type(step) is not int or type(order) is not int or step < 0:
            raise ValueError("its step is no count")
        return Checkpoint(path=path, step=step, facts=facts)
    except (InputError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"checkpoint {path} is damaged: {FACTS} cannot be read ({error}). Remove {path} to go "
            "on from the one before."
        ) from error


def refuse_used(folder: Path, *, resume: bool) -> None:
    """Raise InputError for a folder that a run must not write into."""
    if is_file(folder):
        raise InputError(f"--checkpoint {folder} is a file. Give a folder.")
    foreign = [p.name for p in folder.glob("step-*") if NAME.fullmatch(p.name) and not _ours(p)]
    if foreign:
        raise InputError(
            f"--checkpoint {folder} has {', '.join(sorted(foreign))}, which mist apply has not "
            "written and would replace. Give another folder."
        )
    if not resume and (existing := checkpoints(folder)):
        raise InputError(
            f"--checkpoint {folder} holds the run that wrote {existing[-1].path.name}. Go on from "
            "it with --resume, or give another folder."
        )


def last_of(folder: Path, same: Mapping[str, object]) -> Checkpoint | None:
    """The checkpoint that was written last. Raises InputError unless its facts are the `same`."""
    existing = checkpoints(folder)
    for name, value in same.items() if existing else ():
        known = existing[-1].facts.get(name)
        if known != value:
            raise InputError(
                f"{existing[-1].path} was made with {name} {known}, this run has {value}. "
                "Give another --checkpoint folder, or the same model and seed."
            )
    return existing[-1] if existing else None


def lock(folder: Path) -> int:
    """Make a folder this run's own while the file descriptor that is returned is open.

    Raises InputError when another run has it, OutputError when it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The lock lasts as long as any process has the descriptor: a crash leaves none behind.
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OutputError(
            f"--checkpoint {folder} cannot be written: {error.strerror}. Choose another folder."
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise InputError(
            f"--checkpoint {folder}: another run is writing into it. Wait for its end, or give "
            "another folder."
        ) from error
    except OSError as error:
        sys.stderr.write(
            f"mist: {folder} has no locks ({error.strerror}): start no second run in it.\n"
        )
    return handle
