"""`mist verify`: the plan's real program, dry-run stage by stage, beside what was predicted."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from mist.calibrate.run_comparison import live_bytes
from mist.exec.build.rank_grid import Transfer, chunk_layers, grid_of, transfers
from mist.exec.dryrun.dry_runs import dry_run
from mist.exec.observation import CollectiveComparison, CollectiveTotal, Seen, StageVerified
from mist.model.graph import B, ModelGraph, S
from mist.plans.file import load_plan
from mist.plans.plan import Plan, StageEstimate
from mist.rules.apply import refuse_unplayable
from mist.symbolic.collective_counts import charged
from mist.symbolic.load_programs import Progress, quiet
from mist.trace import load_graph
from mist.workflow.checking import question_of
from mist.workflow.cluster_choice import Rented
from mist.workflow.plan_model import UNDER_HERE, ModelAccess, model_of
from mist.workflow.request import platform_of, setting_of

HERE: Final = Path()  # a plan without a file
MOST_SEARCHES: Final = 4  # of a plan whose dry runs refute it
AXES: Final = ("dp", "tp", "pp")  # beside them: sums of a few numbers, which nothing charges for
UNSEEN: Final = (
    "workspaces of kernels, fragmentation and rounding of the allocator, buffers of NCCL, the "
    "context of CUDA, and tensors that side streams hold longer"
)


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


def verify_file(
    path: Path, progress: Progress = quiet, access: ModelAccess = UNDER_HERE
) -> Verified:
    """Verify a plan file. Raises InputError, PlanError, ModelError, DryRunFailed."""
    plan = load_plan(path)
    source = model_of(plan, path, access, progress)
    named = replace(plan, model=replace(plan.model, source=source))
    return verify_plan(named, progress, path=path)


def verify_plan(
    plan: Plan,
    progress: Progress = quiet,
    *,
    stages: Sequence[int] | None = None,
    path: Path = HERE,
) -> Verified:
    """Dry-run one rank of every stage (or of these) and compare. The model that it names runs.

    `path`: of the plan, beside which the profile of a measured machine may lie. Raises PlanError,
    ModelError, DryRunFailed.
    """
    refuse_unplayable(plan, None)
    source = plan.model.source
    question = question_of(plan, path, source)
    platform = platform_of(question)
    setting = setting_of(question, platform)
    graph = load_graph(source, setting, progress=progress)
    refuse_unplayable(plan, graph)
    numbers = stages or range(len(plan.stages))
    seen = dry_run(plan, numbers, progress, policy=setting.policy)
    per_token = int(graph.blocks[0].boundary_bytes.subs({B: 1, S: 1}))
    found = []
    for each in seen:
        known = charged(graph, platform.runtime, plan, each.stage)
        known |= _transfers(plan, each.stage, per_token, _edges(plan, graph))
        compared = tuple(_compared(known, each.collectives))
        found.append(_stage(each, plan.estimate.stages[each.stage], compared))
    return Verified(plan=plan, stages=tuple(found))


def _stage(
    seen: Seen, judged: StageEstimate, rows: tuple[CollectiveComparison, ...]
) -> StageVerified:
    live = live_bytes(judged)
    return StageVerified(
        seen=seen,
        predicted_bytes=round(live),
        predicted_host_bytes=judged.host_bytes,
        allowance_bytes=round(seen.peak_bytes * (judged.peak_bytes - live) / live),
        usable_bytes=judged.usable_bytes,
        collectives=rows,
    )


Sum = dict[tuple[str, str], tuple[int, int]]


def _edges(plan: Plan, graph: ModelGraph) -> list[bool]:
    """Behind each chunk of layers along the pipeline: whether a gradient comes back."""
    kinds = graph.layer_kinds()
    pieces = {k: piece for i in range(len(plan.stages)) for k, piece in chunk_layers(plan, i)}
    return [graph.blocks[kinds[pieces[k].stop - 1]].goes_back for k in sorted(pieces)]


def _transfers(plan: Plan, stage: int, bytes_per_token: int, edges: Sequence[bool]) -> Sum:
    """What the first rank of a stage sends to its neighbours and receives from them in a step."""
    areas: dict[str, list[int]] = {"send": [], "receive": []}
    last = len(plan.stages) * plan.schedule.vpp - 1
    for chunk in range(plan.schedule.vpp if len(plan.stages) > 1 else 0):
        at = chunk * len(plan.stages) + stage
        for there in (at - 1, at + 1):
            if 0 <= there <= last:
                sent, received = _exchanged(plan, at, there)
                back = edges[min(at, there)]
                areas["send"] += sent if there > at or back else []
                areas["receive"] += received if there < at or back else []
    times = plan.num_micro_batches
    return {
        ("pp", kind): (times * len(found), times * sum(found) * bytes_per_token)
        for kind, found in areas.items()
        if found
    }


def _exchanged(plan: Plan, at: int, there: int) -> tuple[list[int], list[int]]:
    """Areas of the parts that the first rank of a chunk sends to another one, and receives."""
    own, other = (grid_of(plan, plan.stages[chunk % len(plan.stages)]) for chunk in (at, there))
    rank = own.first_rank
    sent = [_area(each) for each in transfers(own, other) if each.source == rank]
    return sent, [_area(each) for each in transfers(other, own) if each.target == rank]


def _area(each: Transfer) -> int:
    span = each.span
    return (span.last - span.first) * (span.right - span.left)


def _compared(known: Sum, issued: tuple[CollectiveTotal, ...]) -> Iterator[CollectiveComparison]:
    """Rows of both."""
    found = {(row.axis, row.kind): (row.count, row.bytes) for row in issued if row.axis in AXES}
    for key in sorted({*known, *found}):
        count, size = found.get(key, (0, 0))
        want = known.get(key, (0, 0))
        yield CollectiveComparison(
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
    for _ in range(MOST_SEARCHES):
        rented = search(margin_ratio)
        verified = verify_plan(rented.planned.plan, progress)
        limit_bytes = rented.planned.limits.device_bytes
        over = max((s.seen.peak_bytes + s.allowance_bytes) / limit_bytes for s in verified.stages)
        if over <= 1.0:
            break
        margin_ratio = 1.0 - limit_bytes / over / verified.stages[0].usable_bytes
        progress(
            f"the winner holds {over:.1%} of its limit, which takes a margin of {margin_ratio:.3f}"
        )
    return rented, verified
