"""One rank of a run: builds its part of the model and trains."""

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from mist.errors import MistError
from mist.exec import checkpoints
from mist.exec.adamw import Settings
from mist.exec.anatomy import examine
from mist.exec.batches import Batches
from mist.exec.group import joined
from mist.exec.launch import LOST
from mist.exec.loading import load
from mist.exec.options import RunOptions
from mist.exec.parallel import Parallel, build, subject_of
from mist.exec.runlog import RunLog, say
from mist.planfile import load_plan
from mist.plans import Plan
from mist.refusals import refuse_unplayable, refuse_world

OF_PEERS = ("gloo", "NCCL", "Connection", "Timed out", "Broken pipe")  # errors that peers cause
WATCHED = 1  # the step (from 0) whose memory and collectives are measured: the first with moments


def main(argv: list[str]) -> int:
    """Run a rank; the exit code. A traceback is printed unless the input is refused."""
    warnings.filterwarnings("ignore", module=r"torch\..*")
    try:
        run(RunOptions.parse(argv[0]))
    except MistError as error:
        sys.stderr.write(f"mist: {error}\n")
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        return LOST if any(word in str(error) for word in OF_PEERS) else 1
    return 0


def run(options: RunOptions) -> None:
    """Train as this rank; RANK, LOCAL_RANK and WORLD_SIZE say which. Raises InputError."""
    plan = load_plan(options.plan)
    refuse_unplayable(plan, None)
    refuse_world(plan, int(os.environ["WORLD_SIZE"]))
    loaded = load(options.model or plan.model.source, plan.workload.attention)
    subject = subject_of(loaded, examine(loaded, plan.workload.seq_len), plan)
    file = Path(options.data) if options.data else None
    batches = Batches(loaded, plan.workload, options.seed, file)
    settings = Settings(lr=options.lr, max_norm=options.max_norm)
    with _asked_to_stop() as stop, joined(options.timeout_s) as device:
        parallel = build(subject, plan, device, settings, options.seed)
        _Training(options=options, plan=plan, parallel=parallel, batches=batches, stop=stop).run()


@dataclass(slots=True)
class _Stop:
    """Whether SIGTERM came."""

    asked: bool = False


@contextmanager
def _asked_to_stop() -> Iterator[_Stop]:
    stop = _Stop()

    def note(number: int, frame: FrameType | None) -> None:
        stop.asked = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(slots=True, kw_only=True)
class _Training:
    """The loop over steps."""

    options: RunOptions
    plan: Plan
    parallel: Parallel
    batches: Batches
    stop: _Stop
    log: RunLog = field(init=False)

    def __post_init__(self) -> None:
        path = Path(self.options.log) if self.options.log and dist.get_rank() == 0 else None
        about = {"model": self.plan.model.name, "device": self.parallel.place.device.type}
        self.log = RunLog(path=path, about={**about, "ranks": dist.get_world_size()})

    def run(self) -> None:
        first = self._resume()
        for number in range(first, self.options.steps):
            self._step(number, watched=number - first == min(WATCHED, self.options.steps - 1))
            done = number + 1
            ending = self._anyone_stops()
            if self._due(done, ending=ending):
                self._save()
            if ending:
                self._say(f"asked to stop after step {done}")
                return

    def _resume(self) -> int:
        if not (self.options.resume and self.options.checkpoint):
            return 0
        folder = Path(self.options.checkpoint)
        done = checkpoints.resume(self.parallel, folder, self._facts())
        self._say(f"resumed after step {done}" if done else f"nothing to resume in {folder}")
        return done

    def _step(self, number: int, *, watched: bool) -> None:
        batch = self.batches.step(number)
        begin = time.perf_counter()
        if watched:
            step, measured = self.parallel.measured_step(batch)
        else:
            step = self.parallel.train_step(batch)
        if self.parallel.place.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        parts = self._stage_parts()
        if watched:
            self._gather(asdict(measured))
        if dist.get_rank() == 0:
            done = {"step": number + 1, "loss": step.loss, "seconds": seconds, "stages": parts}
            self.log.step(done, self.plan.workload.tokens_per_step, measured=watched)

    def _stage_parts(self) -> list[dict[str, float]]:
        """Seconds of the parts of the step just done: of each stage, the mean of its ranks."""
        mine = self.parallel.clock.read()
        own = torch.tensor([*mine.values()], device=self.parallel.place.device)
        every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own)
        found = torch.stack(every)
        spans = (slice(first, first + n) for first, n in (s.devices for s in self.plan.stages))
        means = (found[span].mean(0).tolist() for span in spans)
        names = [f"{part}_s" for part in mine]
        return [dict(zip(names, row, strict=True)) for row in means]

    def _gather(self, measured: dict[str, Any]) -> None:
        """What the first rank of every stage measured, and the highest peak of its ranks."""
        place = self.parallel.place
        mine = {"stage": place.stage, "rank": place.rank, **measured}
        every: list[dict[str, Any]] = [{}] * dist.get_world_size()
        dist.all_gather_object(every, mine)
        for index in range(len(self.plan.stages)):
            rows = [row for row in every if row["stage"] == index]
            peak = max(row["peak_bytes"] for row in rows)
            self.log.stages.append({**rows[0], "peak_bytes": peak})

    def _anyone_stops(self) -> bool:
        flag = torch.tensor(float(self.stop.asked), device=self.parallel.place.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def _due(self, done: int, *, ending: bool) -> bool:
        last = ending or done == self.options.steps
        every = self.options.every
        return self.options.checkpoint is not None and (last or bool(every and done % every == 0))

    def _save(self) -> None:
        assert self.options.checkpoint is not None
        path = checkpoints.save(self.parallel, Path(self.options.checkpoint), self._facts())
        self._say(f"saved {path}")

    def _facts(self) -> dict[str, object]:
        return {"fingerprint": self.plan.model.fingerprint, "seed": self.options.seed}

    def _say(self, message: str) -> None:
        if dist.get_rank() == 0:
            say(message)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
