"""Which of several dead ranks is named: the cause, in whatever order they are seen."""

import signal
import subprocess
import sys
from itertools import permutations

import pytest

from mist.exec.run.launch import LOST, REFUSED, RankFailed, cause, run_ranks

KILLED, ABORTED, OWN = -signal.SIGKILL, -signal.SIGABRT, 1


@pytest.mark.parametrize(
    ("codes", "named"),
    [
        ((KILLED, OWN), KILLED),  # a program of one's own raises when its peer is killed
        ((KILLED, LOST), KILLED),
        ((KILLED, LOST, OWN, ABORTED), KILLED),
        ((-signal.SIGSEGV, OWN, LOST), -signal.SIGSEGV),
        ((OWN, LOST), OWN),
        ((OWN, LOST, ABORTED), OWN),  # torch aborts ranks that wait for one that raised
        ((REFUSED, LOST), REFUSED),
        ((ABORTED, LOST), ABORTED),
        ((OWN, -signal.SIGTERM), OWN),  # whoever else was asked to end was so for that
        ((LOST, 143), LOST),
        ((LOST, LOST), LOST),
    ],
)
def test_the_cause_is_named_in_every_order(codes: tuple[int, ...], named: int) -> None:
    for order in permutations(codes):
        found = dict(enumerate(order))
        assert found[cause(found)] == named


def test_of_equal_ends_the_first_rank_is_named() -> None:
    assert cause({3: OWN, 1: OWN, 2: LOST}) == 1


LATE = """
import os, sys, time
if os.environ["RANK"] == "0":
    sys.exit({first})
time.sleep({wait})
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(("first", "wait"), [(LOST, 2.5), (1, 0.5)])
def test_a_report_that_explains_nothing_is_waited_on(first: int, wait: float) -> None:
    with pytest.raises(RankFailed, match=r"^rank 1 was ended by signal 9\."):
        run_ranks(["-c", LATE.format(first=first, wait=wait)], 2, timeout_s=600)


STUBBORN = """
import signal, time
signal.signal(signal.SIGINT, lambda *_: print("asked", flush=True))
print("ready", flush=True)
while True:
    time.sleep(1)
"""


def test_a_second_interrupt_ends_at_once() -> None:
    code = f"""
from mist.exec.run.launch import Stopped, run_ranks
try:
    run_ranks(["-c", {STUBBORN!r}], 1)
except Stopped as end:
    raise SystemExit(end.exit_code)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stderr is not None
        assert launcher.stderr.readline() == "ready\n"
        launcher.send_signal(signal.SIGINT)
        assert launcher.stderr.readline() == "asked\n"
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(timeout=8) == 130  # before GRACE_S


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_ranks_that_are_asked_before_they_listen_did_not_fail(number: int, code: int) -> None:
    """While they import: the signal ends them as it ends any program."""
    # In one write: where PYTHONUNBUFFERED is set, print makes two, and ranks share the stream.
    ranks = "import os, time; os.write(1, b'ready\\n'); time.sleep(600)"
    # A shell starts what runs in the background with SIGINT ignored.
    launcher_code = f"""
import signal
from mist.exec.run.launch import Stopped, run_ranks
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    run_ranks(["-c", {ranks!r}], 2)
except Stopped as end:
    raise SystemExit(end.exit_code)
"""
    with subprocess.Popen(
        [sys.executable, "-c", launcher_code], stderr=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stderr is not None
        assert [launcher.stderr.readline() for _ in range(2)] == ["ready\n"] * 2
        launcher.send_signal(number)
        assert launcher.wait(timeout=300) == code
