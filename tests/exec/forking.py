"""Forks ranks of the tests' own programs from one process that has imported what they import.

A rank of `mist apply` is an interpreter of its own, and imports torch and transformers for some
seconds; tests of which that is the subject start such ranks (test_apply, test_torchrun,
test_launch, and all that are slow). The others start where those imports end: this program reads
requests from its standard input, a line of JSON each, and answers with exit codes when all ranks
have ended. It has one thread, no process group, and draws no random numbers.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from mist.exec.run.launch import DEFAULTS, LOST, cause, run_ranks
from tests.exec.subjects import SHARED

ROOT = Path(__file__).parents[2]
PRELOADED = (
    "torch.distributed.checkpoint",
    "torch.distributed.pipelining",
    "mist.exec.run.checkpoints",
    "mist.exec.dryrun.observer",
    "tests.exec.running",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "gpt2", "opt")),
)
TIMEOUT_S = 600.0
SETTLE_S = 2.0  # in which the rank that is the cause ends, where its peers are seen to end first
POLL_S = 0.02


class RunRanks(Protocol):
    """Runs `python -m MODULE *arguments` as every rank; an error tells what the cause printed."""

    def __call__(self, module: str, *arguments: object, num_ranks: int) -> object: ...


class Forked(Protocol):
    """The same in forked ranks; returns what rank 0 printed."""

    def __call__(self, module: str, *arguments: object, num_ranks: int) -> str: ...


def interpreters(module: str, *arguments: object, num_ranks: int) -> None:
    """As a rank of a user: each one an interpreter, with its own imports and its own hash seed."""
    run_ranks(["-m", module, *map(str, arguments)], num_ranks, timeout_s=TIMEOUT_S)


@contextmanager
def forking(subjects: Path) -> Iterator[Forked]:
    """Within: the parent of ranks is there from the first call on.

    `subjects`: where it keeps what it knows of models (`tests.exec.subjects`).
    """
    server: list[subprocess.Popen[str]] = []

    def run(module: str, *arguments: object, num_ranks: int) -> str:
        if not server:
            server.append(_start(subjects))
        with tempfile.TemporaryDirectory(prefix="mist-") as folder:
            _ask(server[0], [module, *map(str, arguments)], num_ranks, Path(folder))
            return _printed(Path(folder), 0)

    try:
        yield run
    finally:
        for each in server:
            each.communicate()  # which closes its input: it leaves


def _start(subjects: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tests.exec.forking"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), SHARED: str(subjects), **DEFAULTS},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _ask(
    server: "subprocess.Popen[str]", command: Sequence[str], num_ranks: int, folder: Path
) -> None:
    assert server.stdin is not None and server.stdout is not None
    request = {"command": command, "num_ranks": num_ranks, "folder": str(folder)}
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    codes: list[int] = json.loads(server.stdout.readline())
    failed = {number: code for number, code in enumerate(codes) if code}
    if failed:
        first = cause(failed)
        printed = _printed(folder, first)[-8000:].strip()
        raise AssertionError(f"rank {first} ended with {failed[first]}.\n{printed}")


def _printed(folder: Path, rank: int) -> str:
    return (folder / f"printed-{rank}").read_text(errors="replace")


def serve() -> None:
    """Answer requests until nobody can ask any more."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # a collection in a rank would write to, and so copy, every page of the parent's
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what ranks print is no answer
    for line in sys.stdin:
        request = json.loads(line)
        command, num_ranks, folder = (request[k] for k in ("command", "num_ranks", "folder"))
        ranks = [_fork(command, number, num_ranks, Path(folder)) for number in range(num_ranks)]
        answers.write(json.dumps(_ends(ranks)) + "\n")
        answers.flush()


def _fork(command: Sequence[str], number: int, num_ranks: int, folder: Path) -> int:
    """The process of a rank. Its standard input is the server's: it ends with who asked."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        printed = os.open(folder / f"printed-{number}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        os.environ.update(_environment(number, num_ranks, folder))
        sys.argv[1:] = command[1:]
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _environment(number: int, num_ranks: int, folder: Path) -> Mapping[str, str]:
    return {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "WORLD_SIZE": str(num_ranks),
        "MIST_RENDEZVOUS": f"file://{folder / 'rendezvous'}",
    }


def _ends(ranks: Sequence[int]) -> list[int]:
    """The exit codes of ranks; those that had to be ended are lost."""
    codes: dict[int, int] = {}
    killed: set[int] = set()
    limit = time.monotonic() + TIMEOUT_S
    while len(codes) < len(ranks):
        for rank in ranks:
            if rank not in codes and (end := os.waitpid(rank, os.WNOHANG))[0]:
                codes[rank] = LOST if rank in killed else os.waitstatus_to_exitcode(end[1])
                if codes[rank] and not killed:
                    limit = min(limit, time.monotonic() + SETTLE_S)
        if time.monotonic() > limit and not killed:
            killed = {rank for rank in ranks if rank not in codes}
            for rank in killed:
                os.kill(rank, signal.SIGKILL)
        time.sleep(POLL_S)
    return [codes[rank] for rank in ranks]


if __name__ == "__main__":
    serve()
