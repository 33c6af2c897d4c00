"""Measures this machine: rank programs that time operations, collectives and copies.

Importing this package needs no torch; the ranks load it.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Final

from mist.exec.parent_watch import PREFIX
from mist.exec.profiling.busy import Busy
from mist.exec.profiling.readings import Readings, Request
from mist.exec.run.launch import run_ranks

__all__ = [
    "Busy",
    "Readings",
    "Request",
    "leads",
    "local_ranks",
    "num_gpus",
    "take_network_readings",
    "take_readings",
]

LIMIT_RATIO: Final = 4.0  # of the time asked for, with the start of torch and slow machines
START_S: Final = 120.0


def num_gpus() -> int:
    """GPUs that torch sees."""
    import torch

    return torch.cuda.device_count()


def local_ranks() -> int | None:
    """Ranks of torchrun on this node; None where it did not start this process."""
    count = os.environ.get("LOCAL_WORLD_SIZE")
    return None if count is None else int(count)


def leads() -> bool:
    """Whether this process writes what is measured: of torchrun's ranks only the first does."""
    return os.environ.get("RANK", "0") == "0"


def take_network_readings(request: Request) -> Readings | None:
    """As one rank of torchrun measure what passes between its nodes; None where there is one node.

    Other ranks than the first wait until that has measured its own machine.
    """
    if local_ranks() in (None, int(os.environ.get("WORLD_SIZE", "1"))):
        return None
    from mist.exec.profiling.network import read_network

    return read_network(request, 2 * (START_S + LIMIT_RATIO * request.seconds))


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
