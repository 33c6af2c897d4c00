"""Runs one case in this process, within limits, and says what is wrong with how it ended."""

import io
import json
import logging
import os
import random
import re
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest.mock import patch

from mist.cli import INTERNAL_ERROR, main
from tests.fuzz.categories import CANARY, CATEGORIES
from tests.fuzz.workspace import STATE_NAMES, Workspace, within

EXIT_CODES = {0, 2, 3, 4}  # docs/cli.md; 1, 130 and 143 come of ranks, disks and signals
LIMIT_S = 30
MOST_GIB = 4
REPORT = re.compile(r"with (\S+mist-error-\S+\.txt)\.")
LONGEST_MESSAGE = 20_000


class Hang(BaseException):
    """Ends a case that did not end in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a case ended: exit code, what it printed, processor seconds, and what is wrong."""

    name: str
    argv: list[str]
    code: object
    out: str
    err: str
    seconds: float
    faults: tuple[str, ...]


def limit_memory() -> None:
    """Let this process have no more than the limit: beyond it Python raises MemoryError."""
    resource.setrlimit(resource.RLIMIT_AS, (2 * MOST_GIB * 2**30,) * 2)


def ended(category: str, number: int, workspace: Workspace) -> Ended:
    """Run case `number` of a category; the same number is the same case on every machine."""
    rng = random.Random(f"{category} {number}")
    workspace.restore()
    with within(workspace):
        argv = CATEGORIES[category](rng, workspace)
        before = _names()
        code, out, err, seconds = _run(argv)
        faults = [*_faults(argv, code, out, err), *_left(before)]
    if _peak_gib() > MOST_GIB:
        faults.append(f"memory above {MOST_GIB} GiB")
    name = f"{category} {number}"
    return Ended(
        name=name, argv=argv, code=code, out=out, err=err, seconds=seconds, faults=tuple(faults)
    )


def _run(argv: list[str]) -> tuple[object, str, str, float]:
    # Of the processor: what others run on the machine is no property of a case.
    out, err, begin = io.StringIO(), io.StringIO(), time.process_time()
    sys.argv = ["mist", *argv]
    code: object = None
    with redirect_stdout(out), redirect_stderr(err), _timed() as late, _as_in_a_process():
        try:
            main()
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
    # Whatever became of it: the product answers for all that the code of a model raises.
    code = "hang" if late else code
    return code, out.getvalue(), err.getvalue(), time.process_time() - begin


@contextmanager
def _timed() -> Iterator[list[Hang]]:
    """Within: LIMIT_S of this process's own time; holds a Hang when that was not enough."""
    hangs: list[Hang] = []

    def late(*_: object) -> NoReturn:
        hangs.append(Hang())
        raise hangs[-1]

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        yield hangs
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


class ThisProcess(nullcontext[None]):
    """In the place of a pool of processes."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    def __enter__(self) -> "ThisProcess":  # type: ignore[override]
        return self

    def map(self, call: Callable[[Any], Any], values: Iterable[Any]) -> Iterator[Any]:
        return map(call, values)


@contextmanager
def _as_in_a_process() -> Iterator[None]:
    """Within: warnings are printed, not raised.

    `mist apply` starts no ranks, but reads the checkpoint as each of them would. `mist validate`
    starts no processes, whose imports take seconds: it traces in this one.
    """
    import mist.exec
    import mist.validate.predictions

    before, pool = mist.exec.run_ranks, mist.validate.predictions.ProcessPoolExecutor
    mist.exec.run_ranks = _read_checkpoint
    mist.validate.predictions.ProcessPoolExecutor = ThisProcess  # type: ignore[misc]
    try:
        # A logger may still hold the stderr of a test that ended: no process of its own would.
        with warnings.catch_warnings(), patch.object(logging, "raiseExceptions", False):
            warnings.simplefilter("default")
            yield
    finally:
        mist.exec.run_ranks = before
        mist.validate.predictions.ProcessPoolExecutor = pool  # type: ignore[misc]


def _read_checkpoint(command: list[str], *_: object, **__: object) -> None:
    import torch

    from mist.exec.run.checkpoint_folder import checkpoints
    from mist.exec.run.checkpoints import resume
    from mist.exec.run.run_options import RunOptions

    options = RunOptions.parse(command[-1])
    if options.checkpoint is None or not options.resume:
        return
    zeros = [torch.zeros(2, 3) for _ in STATE_NAMES]
    slot = SimpleNamespace(name="w", first=zeros[1], second=zeros[2])
    rank: Any = SimpleNamespace(
        parameters={"w": zeros[0]},
        side_by_side={},
        chunks=[],
        optimizer=SimpleNamespace(slots=[slot], num_steps=0),
    )
    for last in checkpoints(Path(options.checkpoint))[-1:]:
        resume(rank, last)


def _faults(argv: list[str], code: object, out: str, err: str) -> Iterator[str]:
    if code == INTERNAL_ERROR:
        yield _cause(err)
    elif code not in EXIT_CODES:
        yield f"exit {str(code)[:200]}"
    if "out of memory" in err:
        yield "out of memory"
    if "Traceback (most recent" in err:
        yield "a traceback"
    if warning := re.search(r"\w*Warning: .*", err):
        yield f"a warning: {warning[0][:80]}"
    if len(err) > LONGEST_MESSAGE:
        yield "a message of thousands of characters"
    if code == 2 and not err.strip():
        yield "a refusal without words"
    if "--json" in argv and code in (0, 3) and out:
        yield from _json_faults(out)
    if code == 0 and "--json" not in argv and re.search(r"\b(nan|inf|NaN)\b", out):
        yield "no number in a good answer"


def _cause(err: str) -> str:
    """The error that nobody foresaw, and where it came from."""
    report = REPORT.search(err)
    if report is None:
        return f"internal error: {err[-300:]}"
    path = Path(report[1])
    text = path.read_text()
    path.unlink()
    places = re.findall(r'File "[^"]*/mist/([^"]+)", line (\d+)', text)
    last = text.strip().splitlines()[-1][:160]
    return f"{':'.join(places[-1]) if places else '?'} {last}"


def _json_faults(out: str) -> Iterator[str]:
    def refuse(word: str) -> NoReturn:
        raise ValueError(word)

    try:
        json.loads(out, parse_constant=refuse)
    except ValueError as error:
        yield f"no JSON: {error}"


def _names() -> set[str]:
    return set(os.listdir("."))


def _left(before: set[str]) -> Iterator[str]:
    """What a command must not leave: half of a file, or the sign that code ran."""
    for name in sorted(_names() - before):
        if re.fullmatch(r"\..+\.[0-9a-f_a-z]{8,}", name):
            yield f"half a file: {name}"
    if CANARY.exists() or CANARY.with_name("PWNED").exists():
        yield "code of a file ran"


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
