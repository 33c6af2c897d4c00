"""`mist verify` leaves no process and no folder behind, however it is ended."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mist.plans.file import save_plan
from mist.workflow.checking import HandLayout
from tests.exec.layouts import write_models
from tests.workflow.test_verifying import plan_of

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "from mist.cli import main; main()", "verify", "plan.yaml"]
LIMIT_S = 300.0


def wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.05)


def status_of(pid: int) -> dict[str, str]:
    """What the system says of a process; nothing of one that is gone, or a zombie."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    found = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return {} if found["State"].startswith("Z") else found


def children(pid: int) -> list[int]:
    others = (int(each.name) for each in Path("/proc").iterdir() if each.name.isdecimal())
    return [other for other in others if status_of(other).get("PPid") == str(pid)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_dry_run_ends_with_the_command(tmp_path: Path, number: signal.Signals) -> None:
    write_models(tmp_path)
    save_plan(plan_of(HandLayout(), tmp_path), tmp_path / "plan.yaml")
    (tmp_path / "tmp").mkdir()
    environment = {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "tmp")}
    run = subprocess.Popen(
        COMMAND, cwd=tmp_path, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: bool(children(run.pid)) or run.poll() is not None)
    started = children(run.pid)
    run.send_signal(number)
    _, errors = run.communicate(timeout=LIMIT_S)
    assert started, errors
    wait_for(lambda: not any(status_of(pid) for pid in started))
    assert [*(tmp_path / "tmp").glob("mist-*")] == []  # torch leaves a folder of its own there
    if number is signal.SIGTERM:
        assert run.returncode == 143, errors
        assert errors.endswith("mist: ended by SIGTERM.\n")
