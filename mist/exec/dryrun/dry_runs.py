"""Dry runs of the stages of a plan, several at a time, each in its own process. Torch-free."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Final, Literal, NoReturn

from mist.errors import MistError
from mist.exec.observation import Seen, from_json
from mist.exec.parent_watch import PREFIX
from mist.exec.run.launch import Stopped
from mist.plans.file import save_plan
from mist.plans.plan import Plan
from mist.progress import is_due

POLL_S: Final = 0.1
TAIL_CHARS: Final = 4000  # of what a failed dry run printed


class DryRunFailed(MistError):
    """A dry run ended without a result; the message has the end of what it printed."""

    exit_code = 1


def dry_run(
    plan: Plan,
    stages: Sequence[int],
    progress: Callable[[str], None],
    *,
    policy: Literal["cuda", "cpu"] = "cuda",
    timeout_s: float = 1800.0,
) -> tuple[Seen, ...]:
    """What one rank of each of these stages does in a step. Raises DryRunFailed and Stopped."""
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        folder = Path(name)
        save_plan(plan, folder / "plan.yaml")
        waiting = list(stages)
        running: dict[int, subprocess.Popen[str]] = {}
        limit, num_ended = time.monotonic() + timeout_s, 0
        before = signal.signal(signal.SIGTERM, _stop)
        try:
            while waiting or running:
                while waiting and len(running) < (os.cpu_count() or 1):
                    stage = waiting.pop(0)
                    running[stage] = _start(folder, stage, policy)
                for stage in list(_ended(running)):
                    num_ended += 1
                    if is_due(num_ended, len(stages)):
                        progress(f"stage {stage} of {len(plan.stages)} dry-run")
                if time.monotonic() > limit:
                    raise DryRunFailed(f"the dry runs did not end within {timeout_s:.0f} s.")
                time.sleep(POLL_S)
        finally:
            for process in running.values():
                process.kill()
                _close(process)  # it writes into the folder that goes now
            signal.signal(signal.SIGTERM, before)
        return tuple(from_json((folder / f"{stage}.json").read_bytes()) for stage in stages)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """The default would leave the folder behind."""
    raise Stopped(number)


def _start(folder: Path, stage: int, policy: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-P",  # a file of the current folder is no module of ours
        "-m",
        "mist.exec.dryrun.dry_run",
        str(folder / "plan.yaml"),
        str(stage),
    ]
    with (folder / f"{stage}.err").open("w") as errors:
        return subprocess.Popen(
            [*command, policy, str(folder / f"{stage}.json")],
            # A process per core: threads would only take turns.
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,  # it ends when this closes: then we are gone
            stdout=subprocess.DEVNULL,
            stderr=errors,
            text=True,
        )


def _close(process: subprocess.Popen[str]) -> None:
    """Wait for a process that ends, and close its end of the pipe."""
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def _ended(running: dict[int, subprocess.Popen[str]]) -> Iterator[int]:
    """Stages whose process is over, taken out of `running`."""
    for stage, process in list(running.items()):
        if process.poll() is None:
            continue
        del running[stage]
        _close(process)
        if process.returncode:
            errors = Path(str(process.args[-1])).with_suffix(".err")  # type: ignore[index]
            tail = errors.read_text(errors="replace")[-TAIL_CHARS:].strip()
            error = DryRunFailed(f"the dry run of stage {stage} failed.\n{tail}")
            error.exit_code = process.returncode if process.returncode == 2 else 1
            raise error
        yield stage
