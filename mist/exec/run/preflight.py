"""What is settled before any rank starts: checkpoints, the log, weights. Torch-free."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mist.errors import MistError
from mist.exec.build.pretrained import check, folder_beside
from mist.exec.run.checkpoint_folder import Checkpoint, last_of, lock, refuse_used
from mist.exec.run.run_log import RunLog, say, steps_of
from mist.exec.run.run_options import RunOptions
from mist.plans.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """`options`: with the folder of weights, if any. `last`: the checkpoint to go on from.

    `lock_fds`: open files that keep the checkpoint folder locked.
    """

    options: RunOptions
    last: Checkpoint | None
    lock_fds: tuple[int, ...]

    @property
    def finished(self) -> bool:
        """Whether the run has done all its steps before."""
        return self.last is not None and self.last.step >= self.options.steps


def preflight(options: RunOptions, plan: Plan, *, leads: bool) -> Preflight:
    """Check what a run reads and writes. `leads`: this is the launcher, or rank 0 without one.

    Raises InputError and OutputError.
    """
    lock_fds = _claim(Path(options.checkpoint), options, leads=leads) if options.checkpoint else ()
    try:
        return _read(options, plan, lock_fds)
    except MistError:
        for handle in lock_fds:
            os.close(handle)
        raise


def _claim(folder: Path, options: RunOptions, *, leads: bool) -> tuple[int, ...]:
    """Open files that keep other runs out of a folder."""
    refuse_used(folder, resume=options.resume)
    # Other ranks would find the lock of rank 0.
    if not leads:
        return ()
    handle = lock(folder)
    try:
        refuse_used(folder, resume=options.resume)  # another run may just have ended
    except MistError:
        os.close(handle)
        raise
    return (handle,)


def _read(options: RunOptions, plan: Plan, lock_fds: tuple[int, ...]) -> Preflight:
    last = None
    if options.resume:
        assert options.checkpoint is not None
        last = last_of(Path(options.checkpoint), same_facts(options, plan))
        if options.log is not None:
            steps_of(Path(options.log))
    weights = None if last else _weights(options, plan)
    run_options = replace(options, weights=weights, from_scratch=weights is None)
    return Preflight(options=run_options, last=last, lock_fds=lock_fds)


def same_facts(options: RunOptions, plan: Plan) -> dict[str, object]:
    """What a run must have in common with the one that it goes on from."""
    return {"fingerprint": plan.model.fingerprint, "seed": options.seed}


def say_finished(checks: Preflight) -> None:
    """Tell that there is nothing to do; a log that is not there is written, empty."""
    assert checks.last is not None
    step, steps, log = checks.last.step, checks.options.steps, checks.options.log
    say(f"already at step {step} of {steps} ({checks.last.path}): nothing to do")
    if log is not None and not Path(log).exists():
        RunLog(path=Path(log), about={"resumed_after": step}).write()


def _weights(options: RunOptions, plan: Plan) -> str | None:
    """The folder that weights are read from; None: they are drawn from the seed."""
    if options.from_scratch:
        return None
    folder = options.weights or folder_beside(options.model or plan.model.source)
    if folder is None:
        return None
    check(Path(folder))
    return str(folder)


@contextmanager
def shown_by_torchrun() -> Iterator[None]:
    """Within: a refusal stands in torchrun's own report too, whose banner comes behind our line.

    The file and its form are those of `torch.distributed.elastic.multiprocessing.errors`.
    """
    try:
        yield
    except MistError as error:
        _report(os.environ, error)
        raise


def _report(environment: Mapping[str, str], error: MistError) -> None:
    path = environment.get("TORCHELASTIC_ERROR_FILE")
    if path:
        words = f"mist: {error}"
        extra = {
            "py_callstack": words,
            "timestamp": str(int(time.time())),
        }  # shown as its traceback
        content = {"message": {"message": words, "extraInfo": extra}}
        Path(path).write_text(json.dumps(content), encoding="utf-8")
