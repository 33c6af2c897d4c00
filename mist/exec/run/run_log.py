"""The log of a run: a line for each step, and one JSON file. Torch-free.

{"steps": [{"step": 1, "loss": 5.5, "norm": 1.2, "lr": 3e-4, "seconds": 0.4, "wall_s": 0.5,
    "tokens_per_s": 1024.0, "stages": [{"forward_s": 0.1, "backward_s": 0.2, "sums_s": 0.01,
    "optimizer_s": 0.05}, ...]}, ...],
 "stages": [{"peak_bytes": 123, "rank": 0, "collectives": [...]}, ...], "resumed_after": 0, ...}

`norm`: of the gradient, before clipping. `wall_s`: with making the batch and gathering this log.
`mist compare PLAN LOG` and `mist calibrate PLAN LOG` read the steps behind `resumed_after`: those
before may have had another layout. The file appears whole or not at all, after every step.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mist.documents import read_json
from mist.errors import InputError, printable
from mist.files import write_text
from mist.units import GIB


@dataclass(slots=True, kw_only=True)
class RunLog:
    """The log of a run, kept by rank 0; `path` None: no file."""

    path: Path | None
    about: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)

    def go_on(self, step: int) -> None:
        """Keep what the file says of the steps that a resumed run does not repeat."""
        self.about["resumed_after"] = step
        if self.path is not None:
            self.steps = [row for row in steps_of(self.path) if row["step"] <= step]

    def step(self, done: dict[str, Any], tokens: int, *, measured: bool) -> None:
        """Add a step: step, loss, norm, lr, seconds, stages. `measured`: slower on the CPU."""
        number, loss, seconds = done["step"], done["loss"], done["seconds"]
        row = {**done, "tokens_per_s": tokens / seconds}
        self.steps.append({**row, "measured": True} if measured else row)
        peak = max((stage["peak_bytes"] for stage in self.stages), default=0)
        memory = f"  peak {peak / GIB:.3f} GiB" if peak else ""
        note = "  (watched: slower)" if measured else ""
        line = f"step {number:5d}  loss {loss:.5f}  norm {done['norm']:.4f}  lr {done['lr']:.2e}"
        rate = tokens / seconds
        speed = f"{seconds:.3f} s  {rate:{',.0f' if rate >= 10 else '.3g'}} tokens/s"
        say(f"{line}  {speed}{memory}{note}")
        self.write()

    def write(self) -> None:
        """Write the file."""
        if self.path is not None:
            data = {**self.about, "steps": self.steps, "stages": self.stages}
            write_text(self.path, json.dumps(data, indent=1) + "\n")


def steps_of(path: Path) -> list[dict[str, Any]]:
    """The steps in a log of an earlier run, none where there is no file. Raises InputError."""
    if not os.path.lexists(path):
        return []
    try:
        data: Any = read_json(path, is_finite=False)  # the loss of a step may be no number
        return [{**row, "step": int(row["step"])} for row in data["steps"]]
    except (InputError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--log {path} is no log of a run, and --resume would write into it. Give another file."
        ) from error


def say(message: str) -> None:
    """A line for people: ranks print to standard output, which the launcher sends to its errors."""
    sys.stdout.write(f"{printable(message)}\n")
    sys.stdout.flush()
