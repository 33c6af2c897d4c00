"""One rank of a plan's real program, on fake tensors and a fake process group.

The model is built, divided and trained for a step by the same code as in `mist apply`; tensors have
shapes but no memory, collectives move nothing, so that any rank of any number can be looked at on
one CPU. Composite operations run by the kernels of a GPU (`trace.recording.shim`) or by this CPU's.
Groups of more micro-batches than can be in flight are cut: those in the middle of a step are all
alike.

    python -m mist.exec.dryrun.dry_run PLAN STAGE POLICY OUT
"""

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining import schedules
from torch.testing._internal.distributed.fake_pg import FakeStore

from mist.errors import MistError
from mist.exec.build.adamw import Settings
from mist.exec.build.empty_weights import load_within
from mist.exec.build.model_structure import examine
from mist.exec.build.parallel import Parallel, assemble, subject_of
from mist.exec.build.step_recorder import Rows, collectives_of
from mist.exec.dryrun.observer import Observer, observing
from mist.exec.observation import Seen, to_json
from mist.exec.parent_watch import leave_with_parent
from mist.files import write_bytes
from mist.plans.file import load_plan
from mist.plans.plan import Plan
from mist.plans.schedules import DEFAULT_KIND
from mist.plans.workload import Attention
from mist.trace.models.fake_tensors import tables_of
from mist.trace.models.loader import LoadedModel
from mist.trace.models.source import Policy, TraceSetting
from mist.trace.recording.shim import runs_as

MORE = 3  # micro-batches beyond those in flight that are run: the first, one amid others, the last


def look(plan: Plan, stage: int, policy: Policy) -> Seen:
    """Dry-run a step of the first rank of a stage. Raises ModelError for what cannot be built."""
    short_plan = cut(plan, stage)
    workload = plan.workload
    loaded = load_shapes(plan.model.source, workload.attention, workload.images)
    rank = plan.stages[stage].devices[0]
    with fake_process_group(rank, plan.cluster.num_gpus):
        subject = subject_of(loaded, examine(loaded, plan.workload.seq_len), plan)
        # Meshes and groups compute with ranks as real tensors: the fake mode is for memory only.
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        parallel = assemble(subject, short_plan, torch.device("cpu"), Settings(), lambda: mode)
        observer = Observer(parallel, pins=policy == "cuda")
        parallel.swapper.quietly = observer.on_host
        setting = TraceSetting(
            precision=plan.workload.precision,
            attention=plan.workload.attention,
            policy=policy,
        )
        modules = loaded.module.modules()
        with mode, runs_as(setting, modules), warnings.catch_warnings(action="ignore"):
            _step(parallel, loaded, observer)
    return _observation(plan, stage, short_plan, observer)


def _step(parallel: Parallel, loaded: LoadedModel, observer: Observer) -> None:
    workload = parallel.plan.workload
    batch = loaded.batch(workload.global_batch, workload.seq_len)
    with observing(observer, parallel):
        parallel.unread_step(batch)


def _observation(plan: Plan, stage: int, short_plan: Plan, observer: Observer) -> Seen:
    num_skipped = plan.num_micro_batches - short_plan.num_micro_batches
    rows = extend_totals(observer.rows(), observer.ends, num_skipped)
    return Seen(
        stage=stage,
        rank=plan.stages[stage].devices[0],
        num_micro_batches=short_plan.num_micro_batches,
        peak_bytes=observer.peak_bytes,
        host_bytes=observer.host_peak_bytes,
        static_bytes=observer.static_bytes,
        parts_bytes={name: size for name, size in observer.peak.parts_bytes.items() if size},
        phase=observer.peak.phase,
        module=observer.peak.module,
        operation=observer.peak.operation,
        collectives=collectives_of(rows),
        timeline=tuple(observer.timeline),
    )


def extend_totals(rows: Rows, ends: Sequence[Rows], more: int) -> Rows:
    """Collectives with `more` micro-batches like the one between the first two backward passes."""
    if more == 0:
        return rows
    first, second = ends[0], ends[1]
    totals = dict(rows)
    for key, (count, size) in second.items():
        before = first.get(key, (0, 0))
        total = totals[key]
        totals[key] = (
            total[0] + more * (count - before[0]),
            total[1] + more * (size - before[1]),
        )
    return totals


def cut(plan: Plan, stage: int) -> Plan:
    """The plan with no more micro-batches than its peak and its collectives need."""
    num_stages, kind = len(plan.stages), plan.schedule.kind
    # Other schedules hold all micro-batches (GPipe), or run them in rounds over the chunks.
    if num_stages > 1 and kind is not DEFAULT_KIND:
        return plan
    # As many as 1F1B has in flight here, and no fewer than stages: torch refuses less.
    count = min(max(num_stages - stage - 1 + MORE, num_stages), plan.num_micro_batches)
    samples = plan.workload.global_batch // plan.num_micro_batches * count
    workload = replace(plan.workload, global_batch=samples)
    return replace(plan, num_micro_batches=count, workload=workload)


@contextmanager
def fake_process_group(rank: int, world_size: int) -> Iterator[None]:
    """Within: this process is one rank of a process group that moves nothing."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        with patch.object(schedules, "_batch_p2p", _exchange):
            yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    """A transfer in flight: it holds its tensor, as those of real groups do."""

    tensor: torch.Tensor

    def wait(self) -> bool:
        return True


def _exchange(operations: list[dist.P2POp], desc: str | None = None) -> list[_Sent]:
    """Every transfer is noted by whoever watches operations; none of them moves anything."""
    for each in operations:
        each.op(each.tensor, each.peer, group=each.group, tag=each.tag)
    return [_Sent(tensor=each.tensor) for each in operations]


def load_shapes(source: str, attention: Attention, images: int | None = None) -> LoadedModel:
    """The model of a plan without values: parameters on the meta device, buffers unset.

    Raises ModelError when the source does not give a model.
    """
    loaded = load_within(nullcontext(), source, attention, images)
    for module in loaded.module.modules():
        for table in tables_of(module):
            for name, value in table.items():
                if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                    table[name] = torch.empty_like(value, device="cpu")
    return loaded


def main(argv: list[str]) -> int:
    """Look at one stage and write what was seen; the exit code."""
    plan_file, stage, policy, out = argv
    leave_with_parent(Path(plan_file).parent)
    warnings.filterwarnings("ignore", module=r"torch\..*")
    try:
        observation = look(load_plan(plan_file), int(stage), "cpu" if policy == "cpu" else "cuda")
    except MistError as error:
        sys.stderr.write(f"mist: {error}\n")
        return error.exit_code
    write_bytes(Path(out), to_json(observation))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
