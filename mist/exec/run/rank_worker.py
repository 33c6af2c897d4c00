"""One rank of a run: builds its part of the model and trains."""

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
import torch.distributed as dist

from mist.errors import MistError
from mist.exec.build.adamw import Settings
from mist.exec.build.batches import Batches
from mist.exec.build.empty_weights import load
from mist.exec.build.model_structure import examine
from mist.exec.build.parallel import Parallel, Subject, assemble, initialise, subject_of
from mist.exec.build.process_group import process_group
from mist.exec.build.weight_init import seed_of
from mist.exec.run import checkpoints
from mist.exec.run.checkpoint_folder import Checkpoint, last_of
from mist.exec.run.launch import ALLOCATOR, ASKING, LOST, Stopped
from mist.exec.run.preflight import same_facts
from mist.exec.run.run_log import RunLog, say
from mist.exec.run.run_options import RunOptions
from mist.exec.run.stored_weights import stored_weights
from mist.plans.file import load_plan
from mist.plans.plan import Plan
from mist.rules.apply import refuse_unplayable, refuse_world

Watch = Literal["memory", "collectives"]
OF_PEERS = ("gloo", "NCCL", "Connection", "Timed out", "Broken pipe")  # words of errors by peers
CHANGEABLE = ("lr", "data", "global_batch", "seq_len")  # a resumed run may differ in, and says so
WATCHED = 1  # the step (from 0) whose memory is measured: the first with moments; on a CPU all
COUNTED = 2  # the step whose collectives are counted where that disturbs what is measured (CUDA)


def main(argv: list[str]) -> int:
    """Run a rank; the exit code. A traceback is printed unless the input is refused."""
    warnings.filterwarnings("ignore", module=r"torch\..*")
    for name, value in ALLOCATOR.items():  # torchrun starts ranks without our launcher
        os.environ.setdefault(name, value)
    try:
        run(RunOptions.parse(argv[0]))
    except MistError as error:
        sys.stderr.write(f"mist: {error}\n")
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        return LOST if _by_peers(error) else 1
    return 0


def _by_peers(error: Exception) -> bool:
    """Whether torch raised since another rank is gone; a model's own errors may use any words."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and any(word in str(error) for word in OF_PEERS)


def run(options: RunOptions) -> None:
    """Train as this rank; RANK, LOCAL_RANK and WORLD_SIZE say which.

    Raises InputError, and Stopped when it was asked to end.
    """
    plan = load_plan(options.plan)
    # Before the model is built, which takes long.
    refuse_unplayable(plan, None)
    refuse_world(plan, int(os.environ["WORLD_SIZE"]))
    loaded = load(options.model or plan.model.source, plan.workload.attention, plan.workload.images)
    subject = subject_of(loaded, examine(loaded, plan.workload.seq_len), plan)
    if options.weights is not None:
        values = stored_weights(Path(options.weights), loaded.module)
        subject = replace(subject, values=values)
    file = Path(options.data) if options.data else None
    batches = Batches(loaded, plan.workload, options.seed, file)
    settings = Settings(lr=options.lr, max_norm=options.max_norm)
    with _stop_on_signal() as stop, process_group(options.timeout_s) as device:
        parallel = assemble(subject, plan, device, settings)
        training = _Training(
            options=options, plan=plan, parallel=parallel, batches=batches, stop=stop
        )
        training.run(subject)


@dataclass(slots=True)
class _Stop:
    """The number of the signal that asked for the end; 0: none came."""

    number: int = 0


@contextmanager
def _stop_on_signal() -> Iterator[_Stop]:
    """Within: the first SIGTERM or Ctrl-C is noted, a second one ends the process at once."""
    stop = _Stop()

    def note(number: int, frame: FrameType | None) -> None:
        stop.number = number
        for each in ASKING:
            signal.signal(each, signal.SIG_DFL)

    before = {each: signal.signal(each, note) for each in ASKING}
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _watch(index: int, last: int, device: torch.device) -> Watch | None:
    """What is measured in the step of this index of a run, whose last has index `last`."""
    if index == min(WATCHED, last):
        return "memory"
    return "collectives" if device.type == "cuda" and index == COUNTED else None


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

    def run(self, subject: Subject) -> None:
        """Train to the last step, from the last checkpoint or from the subject's first weights.

        Raises Stopped after a signal, and a checkpoint.
        """
        first = self._begin(subject)
        for number in range(first, self.options.steps):
            last = self.options.steps - first - 1
            self._step(number, _watch(number - first, last, self.parallel.place.device))
            done = number + 1
            signal_number = self._signal_of_any_rank()
            if self._due(done, ending=signal_number > 0):
                self._save()
            if signal_number:
                self._say(f"asked to stop after step {done}")
                raise Stopped(signal_number)

    def _begin(self, subject: Subject) -> int:
        """Give weights and moments their values; the number of steps that are done."""
        options = self.options
        last = self._last() if options.resume else None
        if last is not None:
            return self._resume(last)
        initialise(self.parallel, subject, options.seed)
        self.log.about["weights"] = options.weights or f"seed {options.seed}"
        read = f"read from {options.weights}"
        self._say(f"weights: {read if options.weights else f'drawn from seed {options.seed}'}")
        return 0

    def _last(self) -> Checkpoint | None:
        assert self.options.checkpoint is not None
        last = last_of(Path(self.options.checkpoint), same_facts(self.options, self.plan))
        if last is None:
            self._say(f"nothing to resume in {self.options.checkpoint}")
        return last

    def _resume(self, last: Checkpoint) -> int:
        done = checkpoints.resume(self.parallel, last)
        if "tokens" in last.facts:
            self.batches.go_on(done, int(last.facts["tokens"]))
        elif self.options.data is not None:
            self._say(
                f"{last.path} does not say how many tokens were read: {done} steps of this plan"
            )
        self.log.go_on(done)
        facts = self._facts(done)
        words = [
            f"{name} was {last.facts[name]}, is {facts[name]}"
            for name in CHANGEABLE
            if name in last.facts and last.facts[name] != facts[name]
        ]
        self._say("; ".join([f"weights: of {last.path}; resumed after step {done}", *words]))
        return done

    def _step(self, number: int, watch: Watch | None) -> None:
        batch_begin = time.perf_counter()
        batch = self.batches.step(number)
        place = self.parallel.place
        # Dropout draws the same, resumed or not; ranks that share samples draw alike.
        torch.manual_seed(seed_of(self.options.seed, "step", number, place.stage, place.i))
        begin = time.perf_counter()
        measured = None
        if watch is None:
            step = self.parallel.train_step(batch)
        elif watch == "memory":
            step, measured = self.parallel.measured_step(batch)
        else:
            step, measured = self.parallel.counted_step(batch)
        if place.device.type == "cuda":
            # Launches return at once: the step ends when the device is done.
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        parts = self._stage_parts()
        if measured is not None:
            self._gather(asdict(measured), watch)
        if dist.get_rank() == 0:
            done = {
                "step": number + 1,
                "loss": step.loss,
                "norm": step.norm,
                "lr": self.parallel.optimizer.settings.lr,
                "seconds": seconds,
                "wall_s": time.perf_counter() - batch_begin,
                "stages": parts,
            }
            slow = watch is not None and (place.device.type != "cuda" or watch != "memory")
            self.log.step(done, self.plan.workload.tokens_per_step, measured=slow)

    def _stage_parts(self) -> list[dict[str, float]]:
        """Seconds of the parts of the step just done: of each stage, the mean of its ranks."""
        parts_s = self.parallel.clock.read()
        seconds = torch.tensor([*parts_s.values()], device=self.parallel.place.device)
        gathered = [torch.empty_like(seconds) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, seconds)
        seconds_by_rank = torch.stack(gathered)
        spans = (slice(first, first + n) for first, n in (s.devices for s in self.plan.stages))
        means = (seconds_by_rank[span].mean(0).tolist() for span in spans)
        names = [f"{part}_s" for part in parts_s]
        return [dict(zip(names, row, strict=True)) for row in means]

    def _gather(self, measured: dict[str, Any], watch: Watch | None) -> None:
        """What the first rank of every stage measured, and the highest peak of its ranks."""
        place = self.parallel.place
        row = {"stage": place.stage, "rank": place.rank, **measured}
        gathered: list[dict[str, Any]] = [{}] * dist.get_world_size()
        dist.all_gather_object(gathered, row)
        for index in range(len(self.plan.stages)):
            rows = [row for row in gathered if row["stage"] == index]
            if watch == "collectives":
                self.log.stages[index]["collectives"] = rows[0]["collectives"]
                continue
            highest = {
                name: max(row[name] for row in rows)
                for name, value in rows[0].items()
                if name.endswith("_bytes") and value is not None
            }
            self.log.stages.append({**rows[0], **highest})

    def _signal_of_any_rank(self) -> int:
        """The signal that any rank was asked to end by; 0: none."""
        flag = torch.tensor(float(self.stop.number), device=self.parallel.place.device)
        # Signals reach ranks at different times; all must stop after the same step.
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)

    def _due(self, done: int, *, ending: bool) -> bool:
        last = ending or done == self.options.steps
        every = self.options.every
        return self.options.checkpoint is not None and (last or bool(every and done % every == 0))

    def _save(self) -> None:
        assert self.options.checkpoint is not None
        facts = self._facts(self.parallel.optimizer.num_steps)
        path = checkpoints.save(self.parallel, Path(self.options.checkpoint), facts)
        self._say(f"saved {path}")

    def _facts(self, done: int) -> dict[str, object]:
        """Facts of the run in a checkpoint, for the run that goes on from it."""
        workload, file = self.plan.workload, self.options.data
        return {
            **same_facts(self.options, self.plan),
            "tokens": self.batches.position(done),
            "lr": self.options.lr,
            "data": str(Path(file).resolve()) if file else None,
            "global_batch": workload.global_batch,
            "seq_len": workload.seq_len,
        }

    def _say(self, message: str) -> None:
        if dist.get_rank() == 0:
            say(message)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
