"""Starts the ranks of a run on this machine and ends them together. Torch-free.

Each rank is a process of its own. The first that fails ends the others, and its traceback is what
is shown. A rank whose launcher is gone sees the end of its standard input and leaves.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Final

from mist.errors import MistError

GRACE_S: Final = 10.0  # between asking the other ranks to end and ending them
POLL_S: Final = 0.05
REFUSED: Final = 2  # exit code of a rank that was given what cannot be used
LOST: Final = 75  # exit code of a rank that failed because another one did
SETTLE_S: Final = 1.0  # in which the rank that failed first shows, where peers notice before us


class RankFailed(MistError):
    """A rank died; the message has its number and the end of what it printed."""

    exit_code = 1


@dataclass(slots=True, kw_only=True)
class Rank:
    """One running rank, and the file that its errors go to."""

    number: int
    process: subprocess.Popen[bytes]
    errors: IO[bytes]

    def tail(self, num_bytes: int = 8000) -> str:
        """The end of what the rank printed to standard error."""
        size = self.errors.seek(0, os.SEEK_END)
        self.errors.seek(max(size - num_bytes, 0))
        return self.errors.read().decode(errors="replace").strip()


def run_ranks(command: Sequence[str], num_ranks: int, *, timeout_s: float | None = None) -> None:
    """Run `python *command` as every rank and wait for all of them.

    Ranks find themselves through RANK, LOCAL_RANK, WORLD_SIZE and MIST_RENDEZVOUS. SIGTERM and
    Ctrl-C are passed on. Raises RankFailed with the first failure, also at the time limit.
    """
    with tempfile.TemporaryDirectory(prefix="mist-") as folder:
        ranks = [_start(command, number, num_ranks, Path(folder)) for number in range(num_ranks)]
        with _passing_on(ranks):
            try:
                _wait(ranks, timeout_s)
            finally:
                _end(ranks)


def _start(command: Sequence[str], number: int, num_ranks: int, folder: Path) -> Rank:
    errors = (folder / f"errors-{number}").open("w+b")
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    process = subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, **_environment(number, num_ranks, folder), "OMP_NUM_THREADS": threads},
        stdin=subprocess.PIPE,
        stdout=2,  # progress is no result
        stderr=errors,
        start_new_session=True,
    )
    return Rank(number=number, process=process, errors=errors)


def _environment(number: int, num_ranks: int, folder: Path) -> Mapping[str, str]:
    return {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(num_ranks),
        "MIST_RENDEZVOUS": f"file://{folder / 'rendezvous'}",
    }


@contextmanager
def _passing_on(ranks: Sequence[Rank]) -> Iterator[None]:
    """Within: SIGTERM and Ctrl-C reach every rank, which saves and leaves."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(signal.SIGTERM)

    before: dict[signal.Signals, Callable[..., object] | int | None] = {}
    for name in (signal.SIGTERM, signal.SIGINT):
        before[name] = signal.signal(name, pass_on)
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _wait(ranks: Sequence[Rank], timeout_s: float | None) -> None:
    limit = None if timeout_s is None else time.monotonic() + timeout_s
    while any(rank.process.poll() is None for rank in ranks):
        _raise_first(ranks)
        if limit is not None and time.monotonic() > limit:
            raise RankFailed(f"the ranks did not finish within {timeout_s:.0f} s.")
        time.sleep(POLL_S)
    _raise_first(ranks)


def _raise_first(ranks: Sequence[Rank]) -> None:
    """Raise for a failed rank: one that failed by itself before one that lost its peers."""
    if not any(_failed(rank) for rank in ranks):
        return
    time.sleep(SETTLE_S)
    first = min(filter(_failed, ranks), key=lambda rank: rank.process.returncode == LOST)
    code = first.process.returncode
    how = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
    error = RankFailed(f"rank {first.number} {how}.\n{first.tail()}")
    error.exit_code = REFUSED if code == REFUSED else 1
    raise error


def _failed(rank: Rank) -> bool:
    return rank.process.poll() not in (None, 0)


def _end(ranks: Sequence[Rank]) -> None:
    """End what still runs, gently at first."""
    running = [rank for rank in ranks if rank.process.poll() is None]
    for rank in running:
        rank.process.terminate()
    limit = time.monotonic() + GRACE_S
    for rank in running:
        try:
            rank.process.wait(max(limit - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            rank.process.kill()
            rank.process.wait()
    for rank in ranks:
        rank.errors.close()
        if rank.process.stdin is not None:
            rank.process.stdin.close()
