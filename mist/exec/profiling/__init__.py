"""Measures this machine: rank programs that time operations, collectives and copies.

Importing this package needs no torch; the ranks load it.
"""

import sys
import tempfile
from pathlib import Path
from typing import Final

from mist.exec.parent_watch import PREFIX
from mist.exec.profiling.busy import Busy
from mist.exec.profiling.readings import Readings, Request
from mist.exec.run.launch import run_ranks

__all__ = ["Busy", "Readings", "Request", "num_gpus", "take_readings"]

LIMIT_RATIO: Final = 4.0  # of the time asked for, with the start of torch and slow machines
START_S: Final = 120.0


def num_gpus() -> int:
    """GPUs that torch sees."""
    import torch

    return torch.cuda.device_count()


def take_readings(request: Request) -> Readings:
    """Measure with every rank at work, as in training. Raises RankFailed."""
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        folder = Path(name)
        out = folder / "readings.json"
        sys.stderr.flush()
        run_ranks(
            ["-m", "mist.exec.profiling.profile_worker", request.dump(), str(out)],
            request.num_ranks,
            timeout_s=START_S + LIMIT_RATIO * request.seconds,
            folder=folder,
        )
        return Readings.parse(out.read_text(encoding="utf-8"))
