"""`mist verify`: the plan's real program, dry-run stage by stage, beside what was predicted."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mist.exec.grid import Transfer, grid_of, transfers
from mist.exec.seen import Issued, Seen
from mist.exec.verify import dry_run
from mist.graph import B, S
from mist.planfile import load_plan
from mist.plans import Plan, StageEstimate
from mist.platform import load_platform
from mist.programs import Progress, quiet
from mist.refusals import refuse_unplayable
from mist.symbolic.charges import charged
from mist.trace import Setting, load_graph
from mist.workflow.renting import Rented

MEMORY_TOLERANCE: Final = 0.08  # between the live bytes predicted and seen, of those seen
BYTES_TOLERANCE: Final = 0.01  # between the bytes of collectives charged and issued
MOST_SEARCHES: Final = 3  # of a plan that its dry run refutes
AXES: Final = ("dp", "tp", "pp")  # beside them: sums of a few numbers, which nothing charges for
UNSEEN: Final = (
    "workspaces of kernels, fragmentation and rounding of the allocator, buffers of NCCL, the "
    "context of CUDA, and tensors that side streams hold longer"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Collectives of one kind along one axis: charged by the cost model, issued by the program."""

    axis: str
    kind: str
    charged: int
    charged_bytes: int
    issued: int
    issued_bytes: int

    @property
    def agrees(self) -> bool:
        """Equal in count, and in bytes within the tolerance."""
        difference = abs(self.charged_bytes - self.issued_bytes)
        return self.charged == self.issued and difference <= BYTES_TOLERANCE * self.issued_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StageVerified:
    """One stage. `predicted_bytes`: live, without the allocator's overhead.

    `allowance_bytes`: for what a dry run does not see.
    """

    seen: Seen
    predicted_bytes: int
    predicted_host_bytes: int
    allowance_bytes: int
    usable_bytes: int
    collectives: tuple[Compared, ...]

    @property
    def difference_ratio(self) -> float:
        """Predicted less seen, of seen."""
        return self.predicted_bytes / self.seen.peak_bytes - 1

    @property
    def fits(self) -> bool:
        """Whether what was seen fits beside the allowance."""
        return self.seen.peak_bytes + self.allowance_bytes <= self.usable_bytes

    @property
    def agrees(self) -> bool:
        """Whether prediction and program agree within the tolerances."""
        within = abs(self.difference_ratio) <= MEMORY_TOLERANCE
        return within and all(row.agrees for row in self.collectives)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """A plan with every stage dry-run."""

    plan: Plan
    stages: tuple[StageVerified, ...]

    @property
    def fits(self) -> bool:
        """Whether every stage fits."""
        return all(stage.fits for stage in self.stages)

    @property
    def agrees(self) -> bool:
        """Whether the prediction agrees with the program on every stage."""
        return all(stage.agrees for stage in self.stages)


def verify_file(path: Path, progress: Progress = quiet) -> Verified:
    """Verify a plan file. Raises InputError, PlanError, ModelError, DryRunFailed."""
    return verify_plan(load_plan(path), progress)


def verify_plan(
    plan: Plan, progress: Progress = quiet, *, stages: Sequence[int] | None = None
) -> Verified:
    """Dry-run one rank of every stage (or of these) and compare.

    Raises PlanError, ModelError, DryRunFailed.
    """
    refuse_unplayable(plan, None)
    workload = plan.workload
    setting = Setting(precision=workload.precision, attention=workload.attention)
    graph = load_graph(plan.model.source, setting, progress=progress)
    refuse_unplayable(plan, graph)
    runtime = load_platform(
        num_gpus=plan.cluster.num_gpus,
        gpu=plan.cluster.device,
        cluster=plan.cluster.name,
        runtime=plan.runtime,
    ).runtime
    seen = dry_run(plan, stages or range(len(plan.stages)), progress)
    per_token = int(graph.blocks[0].boundary_bytes.subs({B: 1, S: 1}))
    found = []
    for each in seen:
        rows = charged(graph, runtime, plan, each.stage)
        known = {(row.axis, row.kind): (row.count, row.bytes) for row in rows}
        known |= _transfers(plan, each.stage, per_token)
        compared = tuple(_compared(known, each.collectives))
        found.append(_stage(each, plan.estimate.stages[each.stage], compared))
    return Verified(plan=plan, stages=tuple(found))


def _stage(seen: Seen, judged: StageEstimate, rows: tuple[Compared, ...]) -> StageVerified:
    allocator = judged.memory_parts_bytes["allocator"]
    live = judged.peak_bytes - allocator
    return StageVerified(
        seen=seen,
        predicted_bytes=live,
        predicted_host_bytes=judged.host_bytes,
        allowance_bytes=round(seen.peak_bytes * allocator / live),
        usable_bytes=judged.usable_bytes,
        collectives=rows,
    )


Sum = dict[tuple[str, str], tuple[int, int]]


def _transfers(plan: Plan, stage: int, bytes_per_token: int) -> Sum:
    """What the first rank of a stage sends to its neighbours and receives from them in a step."""
    grids = [grid_of(plan, each) for each in plan.stages]
    rank, last = grids[stage].first_rank, len(grids) * plan.schedule.vpp - 1
    areas: dict[str, list[int]] = {"send": [], "receive": []}
    for chunk in range(plan.schedule.vpp if len(grids) > 1 else 0):
        at = chunk * len(grids) + stage
        for there in (at - 1, at + 1):
            if 0 <= there <= last:
                other = grids[there % len(grids)]
                sent, received = transfers(grids[stage], other), transfers(other, grids[stage])
                areas["send"] += [_area(each) for each in sent if each.source == rank]
                areas["receive"] += [_area(each) for each in received if each.target == rank]
    times = plan.num_micro_batches
    return {
        ("pp", kind): (times * len(found), times * sum(found) * bytes_per_token)
        for kind, found in areas.items()
        if found
    }


def _area(each: Transfer) -> int:
    span = each.span
    return (span.last - span.first) * (span.right - span.left)


def _compared(known: Sum, issued: tuple[Issued, ...]) -> Iterator[Compared]:
    """Rows of both."""
    found = {(row.axis, row.kind): (row.count, row.bytes) for row in issued if row.axis in AXES}
    for key in sorted({*known, *found}):
        count, size = found.get(key, (0, 0))
        want = known.get(key, (0, 0))
        yield Compared(
            axis=key[0],
            kind=key[1],
            charged=want[0],
            charged_bytes=want[1],
            issued=count,
            issued_bytes=size,
        )


def until_it_fits(
    search: Callable[[float | None], Rented], margin_ratio: float | None, progress: Progress
) -> tuple[Rented, Verified]:
    """Search, dry-run the winner, and search again with more margin while it does not fit.

    Raises what the search and `verify_plan` raise.
    """
    rented = search(margin_ratio)
    for _ in range(MOST_SEARCHES):
        verified = verify_plan(rented.planned.plan, progress)
        limit_bytes = rented.planned.limits.device_bytes
        over = max((s.seen.peak_bytes + s.allowance_bytes) / limit_bytes for s in verified.stages)
        if over <= 1.0:
            break
        usable_bytes = verified.stages[0].usable_bytes
        margin_ratio = 1.0 - limit_bytes / over / usable_bytes
        progress(f"the winner holds {over:.1%} of its limit: margin {margin_ratio:.3f} instead")
        rented = search(margin_ratio)
    return rented, verify_plan(rented.planned.plan, progress) if over > 1.0 else verified
