"""Starts the ranks of a run on this machine and ends them together. Torch-free.

Each rank is a process of its own. When one fails the others are ended, and the traceback of the one
that was the cause is what is shown: ends are collected for a moment and judged by their kind, since
which of them is seen first is chance. A rank whose launcher is gone sees the end of its standard
input and leaves.
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
from mist.exec.parent_watch import PREFIX

GRACE_S: Final = 10.0  # between asking the other ranks to end and ending them
POLL_S: Final = 0.05
REFUSED: Final = 2  # exit code of a rank that was given what cannot be used
LOST: Final = 75  # exit code of a rank that failed because another one did
SETTLE_S: Final = 1.0  # in which the rank that is the cause shows, where peers notice before us
CONSEQUENCE: Final = 2  # from this severity on, an exit code says that something else went wrong
ASKING: Final = (signal.SIGINT, signal.SIGTERM)
STOPPED: Final = {128 + number: number for number in ASKING}  # exit codes of ranks that were asked


# Unless the user says otherwise: one thread, and memory that tensors of any size can share, as
# copies on side streams free theirs late and pools of several streams would grow apart.
ALLOCATOR: Final = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
DEFAULTS: Final = {"OMP_NUM_THREADS": "1", **ALLOCATOR}


class RankFailed(MistError):
    """A rank died; the message has its number and the end of what it printed."""

    exit_code = 1


class Stopped(MistError):
    """The run was asked to end, and did; the exit code is that of shells: 128 + the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}.")
        self.exit_code = 128 + number


@dataclass(slots=True, kw_only=True)
class _StopRequest:
    """The signal that the launcher was sent, if any, and whether it killed the ranks for it."""

    number: int | None = None
    killed: bool = False


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


def run_ranks(
    command: Sequence[str],
    num_ranks: int,
    *,
    timeout_s: float | None = None,
    lock_fds: Sequence[int] = (),
    folder: Path | None = None,
) -> None:
    """Run `python *command` as every rank and wait for all of them.

    Ranks find themselves through RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, WORLD_SIZE and
    MIST_RENDEZVOUS. SIGTERM and Ctrl-C are passed on; the second one ends all at once. `lock_fds`:
    files that ranks keep open too, so that locks on them last as long as any rank. `folder`: where
    ranks meet, a temporary one of the caller's; else one that lasts as long as they do. Raises
    RankFailed with the cause of the first failure, also at the time limit, and Stopped after a
    signal.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
            run_ranks(command, num_ranks, timeout_s=timeout_s, lock_fds=lock_fds, folder=Path(name))
        return
    ranks: list[Rank] = []
    with _passing_on(ranks) as stop:  # before the first rank: none outlives us
        try:
            for number in range(num_ranks):
                ranks.append(_start(command, number, num_ranks, folder, lock_fds))
                if stop.number is not None:  # asked before this one was known
                    ranks[-1].process.send_signal(stop.number)
            _wait(ranks, timeout_s, stop)
        finally:
            _end(ranks)


def _start(
    command: Sequence[str], number: int, num_ranks: int, folder: Path, lock_fds: Sequence[int]
) -> Rank:
    errors = (folder / f"errors-{number}").open("w+b")
    defaults = {name: os.environ.get(name, value) for name, value in DEFAULTS.items()}
    process = subprocess.Popen(
        [sys.executable, "-P", *command],  # a file of the current folder is no module of ours
        env={**os.environ, **_environment(number, num_ranks, folder), **defaults},
        # A rank leaves when this pipe closes: then the launcher is gone.
        stdin=subprocess.PIPE,
        stdout=2,  # progress is no result
        stderr=errors,
        # In the launcher's session Ctrl-C would reach ranks twice, from the terminal and from us.
        start_new_session=True,
        pass_fds=lock_fds,
    )
    return Rank(number=number, process=process, errors=errors)


def _environment(number: int, num_ranks: int, folder: Path) -> Mapping[str, str]:
    return {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "WORLD_SIZE": str(num_ranks),
        "MIST_RENDEZVOUS": f"file://{folder / 'rendezvous'}",
    }


@contextmanager
def _passing_on(ranks: Sequence[Rank]) -> Iterator[_StopRequest]:
    """Within: SIGTERM and Ctrl-C reach every rank, which saves and leaves; the second one kills."""
    stop = _StopRequest()

    def pass_on(number: int, frame: FrameType | None) -> None:
        stop.killed = stop.number is not None
        stop.number = number
        for rank in ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(signal.SIGKILL if stop.killed else number)

    before: dict[signal.Signals, Callable[..., object] | int | None] = {}
    for name in ASKING:
        before[name] = signal.signal(name, pass_on)
    try:
        yield stop
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _wait(ranks: Sequence[Rank], timeout_s: float | None, stop: _StopRequest) -> None:
    limit = None if timeout_s is None else time.monotonic() + timeout_s
    while any(rank.process.poll() is None for rank in ranks):
        if any(_failed(rank) for rank in ranks):
            break
        if limit is not None and time.monotonic() > limit:
            raise RankFailed(f"the ranks did not finish within {timeout_s:.0f} s.")
        time.sleep(POLL_S)
    if any(_failed(rank) for rank in ranks):
        _settle(ranks)
        _raise_cause(ranks, stop)


def _settle(ranks: Sequence[Rank]) -> None:
    """Wait for the ends of other ranks: longer while none of those seen explains itself."""
    begin = time.monotonic()
    while any(rank.process.poll() is None for rank in ranks):
        codes = [rank.process.returncode for rank in ranks if _failed(rank)]
        known = any(severity(code) < CONSEQUENCE for code in codes)
        if time.monotonic() - begin > (SETTLE_S if known else GRACE_S):
            return
        time.sleep(POLL_S)


def severity(code: int) -> int:
    """How likely an exit code is a cause: 0 the likeliest, from CONSEQUENCE on an effect.

    A signal comes from outside (out of memory, a crash), so before an exception: peers of a killed
    rank raise. SIGABRT is what torch's watchdog and uncaught C++ errors do when peers are gone.
    """
    if code in STOPPED or -code in ASKING:
        return 4  # asked to end, by us or by somebody
    if code == LOST:
        return 3
    if code == -signal.SIGABRT:
        return CONSEQUENCE
    return 0 if code < 0 else 1


def cause(codes: Mapping[int, int]) -> int:
    """The rank whose end explains those of the others. `codes`: by rank, of those that failed."""
    return min(codes, key=lambda number: (severity(codes[number]), number))


def _raise_cause(ranks: Sequence[Rank], stop: _StopRequest) -> None:
    """Raise for the rank that is the cause, or for the signal that ranks were asked to end by."""
    codes = {rank.number: rank.process.returncode for rank in ranks if _failed(rank)}
    first = ranks[cause(codes)]
    code = codes[first.number]
    number = STOPPED.get(code) if stop.number is None else stop.number
    if number is not None and (stop.killed or severity(code) >= CONSEQUENCE):
        raise Stopped(number)
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
