"""The plan: what comes out of the search, and all that crosses to execution and reports.

`mist.plans.file` reads and writes it. Invariants (`plan_faults`): dp * tp * cp ranks are the
devices of a stage; ep divides dp * cp; dp_replicate divides dp, and is 1 or less than dp and from
ZeRO-1 on; dp * micro_batch is equal over stages and times num_micro_batches is the global batch;
the layer runs cover the model once, in order; the devices cover the cluster once; memory levels sum
to the layers. The layers that keep least come first in a stage, and are dealt out over its chunks:
those run backward last, when most else is gone, and the first chunk waits longest.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Final, Literal

from pydantic import Field

from mist.errors import Fault, PlanError
from mist.plans.provenance import Kind
from mist.plans.schedules import DEFAULT_KIND, SCHEDULES
from mist.plans.workload import STRICT, MemoryLevel, PositiveInt, ScheduleKind, Workload

SCHEMA: Final = "mist.plan/1"

Number = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[Number, Field(ge=0.0)]
Ratio = Annotated[Number, Field(ge=0.0, le=1.0)]
Bytes = Annotated[int, Field(ge=0)]
How = Literal["law", "table", "measured"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """Which model: where it came from and how to recognise it.

    `trainable`: how many of `params` have a gradient; None where all have.
    """

    __pydantic_config__ = STRICT
    source: str
    name: str
    params: PositiveInt
    fingerprint: str
    trainable: PositiveInt | None = None

    @property
    def num_trainable(self) -> int:
        """Parameters that have a gradient."""
        return self.params if self.trainable is None else self.trainable


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRef:
    """Which machines. `host_memory_bytes`: of one node, where the user gave it; else left out."""

    __pydantic_config__ = STRICT
    name: str
    device: str
    num_gpus: PositiveInt
    gpus_per_node: PositiveInt
    host_memory_bytes: PositiveInt | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Order of micro-batches in the pipeline; `vpp` model chunks per stage."""

    __pydantic_config__ = STRICT
    kind: ScheduleKind
    vpp: PositiveInt


DEFAULT_SCHEDULE: Final = Schedule(kind=DEFAULT_KIND, vpp=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offload:
    """Share of each state that lives in host memory (0..1)."""

    __pydantic_config__ = STRICT
    weights: Ratio = 0.0
    grads: Ratio = 0.0
    optimizer: Ratio = 0.0
    activations: Ratio = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One pipeline stage. `layers` are runs [first, count]; `devices` is [first, count].

    `dp_replicate`: copies of the states that ZeRO divides (HSDP): dp / dp_replicate neighbouring
    data-parallel ranks share one, and sum their gradients with the others. A plan file leaves 1
    out.
    """

    __pydantic_config__ = STRICT
    layers: tuple[tuple[int, int], ...]
    devices: tuple[int, int]
    dp: PositiveInt
    tp: PositiveInt
    sp: bool
    cp: PositiveInt
    ep: PositiveInt
    micro_batch: PositiveInt
    zero: Literal[0, 1, 2, 3]
    head: Literal["none"]
    memory: dict[MemoryLevel, Annotated[int, Field(ge=0)]]
    offload: Offload
    dp_replicate: PositiveInt = 1

    @property
    def dp_shard(self) -> int:
        """Data-parallel ranks that share one copy of the states: 1 at ZeRO-0."""
        return self.dp // self.dp_replicate if self.zero else 1

    @property
    def num_layers(self) -> int:
        """Layers of the stage."""
        return sum(count for _, count in self.layers)

    @property
    def levels(self) -> tuple[MemoryLevel, ...]:
        """The memory level of each layer of the stage, in order: those that keep least first."""
        chunks: list[list[MemoryLevel]] = [[] for _ in self.layers]
        sizes = [count for _, count in self.layers]
        for level in reversed(MemoryLevel):
            for _ in range(self.num_at(level)):
                shares = [len(chunk) / size for chunk, size in zip(chunks, sizes, strict=True)]
                chunks[shares.index(min(shares))].append(level)
        return tuple(level for chunk in chunks for level in chunk)

    def num_at(self, level: MemoryLevel) -> int:
        """Layers of the stage at a memory level."""
        return self.memory.get(level, 0)

    @property
    def num_full(self) -> int:
        """Layers recomputed whole in the backward pass (the first ones of the stage)."""
        return self.num_at(MemoryLevel.FULL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a model is trained, without what is predicted of it: G micro-batches through stages."""

    stages: Sequence[StagePlan]
    num_micro_batches: int
    schedule: Schedule = DEFAULT_SCHEDULE


def fullest_host_bytes(
    stages: Sequence[StagePlan], held_bytes: Sequence[float], ranks_per_host: int
) -> float:
    """What the ranks of the fullest host hold in its memory; `held_bytes`: a rank of each stage."""
    pairs = zip(held_bytes, stages, strict=True)
    ranks = [held for held, stage in pairs for _ in range(stage.devices[1])]
    starts = range(0, len(ranks), ranks_per_host)
    return max(sum(ranks[first : first + ranks_per_host]) for first in starts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bytes that one device may hold, and one rank in host memory.

    `shares_host`: ranks of other stages on the node must leave room for what a rank holds there, so
    that a stage that is no faster but holds less may be needed.
    """

    device_bytes: float
    host_bytes: float
    shares_host: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEstimate:
    """Predicted time and memory of a stage; the parts sum to the whole."""

    __pydantic_config__ = STRICT
    stable_s: Seconds
    delta_s: Number
    time_parts_s: dict[str, Number]
    peak_bytes: Bytes
    usable_bytes: Bytes
    memory_parts_bytes: dict[str, int]
    host_bytes: Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncertainty:
    """Half width of the interval around the prediction, as a ratio, and where it comes from.

    `calibrated`: whether constants were fitted to whole runs of this runtime and device.
    """

    __pydantic_config__ = STRICT
    step_ratio: Annotated[Number, Field(ge=0.0)]
    memory_ratio: Annotated[Number, Field(ge=0.0)]
    calibrated: bool
    basis: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OpCost:
    """How one kind of operation is priced: by a law, a published table or one of this machine.

    `source` and `kind` are those of the least sure figure that enters.
    """

    __pydantic_config__ = STRICT
    what: str
    how: How
    source: str
    kind: Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A prediction of one training step, with its parts and what it leaves out.

    `extrapolated`: what lies far outside the table that prices it, a sentence each.
    """

    __pydantic_config__ = STRICT
    step_s: Seconds
    tokens_per_s: Number
    mfu: Number
    bubble_s: Seconds
    stages: tuple[StageEstimate, ...]
    uncertainty: Uncertainty
    op_costs: tuple[OpCost, ...]
    extrapolated: tuple[str, ...]
    not_modelled: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Another layout that was judged, why it loses, and what would make it as fast as the plan."""

    __pydantic_config__ = STRICT
    layout: str
    step_s: Seconds
    peak_bytes: Bytes
    reason: str
    needs: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What made the plan: versions, profiles, solver, gap, search. No times."""

    __pydantic_config__ = STRICT
    mist: str
    profiles: dict[str, str]
    solver: str
    gap: Number
    lower_bound_s: Number
    search: dict[str, str | int | Number]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to train a model on a cluster. Raises PlanError with every broken invariant.

    `alternatives` fit and are slower; `excluded` are faster and do not fit.
    """

    __pydantic_config__ = STRICT
    schema: Literal["mist.plan/1"] = SCHEMA
    model: ModelRef
    workload: Workload
    cluster: ClusterRef
    runtime: str
    schedule: Schedule
    num_micro_batches: PositiveInt
    stages: tuple[StagePlan, ...]
    estimate: Estimate
    alternatives: tuple[Alternative, ...]
    excluded: tuple[Alternative, ...]
    provenance: Provenance

    def __post_init__(self) -> None:
        faults = tuple(plan_faults(asdict(self)))
        if faults:
            raise PlanError(f"plan for {self.model.name}", faults)

    @property
    def layout(self) -> Layout:
        """The plan without its prediction."""
        return Layout(
            stages=self.stages,
            num_micro_batches=self.num_micro_batches,
            schedule=self.schedule,
        )

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return sum(stage.num_layers for stage in self.stages)


def plan_faults(data: Mapping[str, object]) -> Iterator[Fault]:
    """Every broken invariant of a plan given as plain data, possibly malformed elsewhere.

    A rule whose fields are missing or of the wrong type is skipped: the schema reports those.
    """
    stages = [(f"stages[{i}]", stage) for i, stage in enumerate(_list(data.get("stages")))]
    if data.get("stages") in ([], ()):
        yield Fault(path="stages", message="a plan has at least one stage")
    for path, stage in stages:
        yield from _stage_faults(path, stage)
    yield from _chunk_faults(stages, _map(data.get("schedule")))
    yield from _layer_faults(stages)
    yield from _device_faults(stages, _int(_map(data.get("cluster")).get("num_gpus")))
    yield from _estimate_faults(data.get("estimate"), len(stages))
    global_batch = _int(_map(data.get("workload")).get("global_batch"))
    yield from _batch_faults(stages, global_batch, _int(data.get("num_micro_batches")))


_Stages = Sequence[tuple[str, Mapping[str, object]]]


def _map(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[Mapping[str, object]]:
    return [_map(item) for item in value] if isinstance(value, list | tuple) else []


def _int(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _ints(stage: Mapping[str, object], *names: str) -> tuple[int, ...] | None:
    values = [_int(stage.get(name)) for name in names]
    return tuple(v for v in values if v is not None) if None not in values else None


def _runs(value: object) -> list[tuple[int, int]]:
    """The well-formed [first, count] pairs of a list; a malformed one empties it."""
    items = value if isinstance(value, list | tuple) else []
    runs = [(item[0], item[1]) for item in items if _is_run(item)]
    return runs if len(runs) == len(items) else []


def _is_run(item: object) -> bool:
    return (
        isinstance(item, list | tuple)
        and len(item) == 2
        and all(_int(part) is not None for part in item)
    )


def _estimate_faults(estimate: object, num_stages: int) -> Iterator[Fault]:
    """A prediction judges every stage."""
    judged = _map(estimate).get("stages")
    if num_stages and isinstance(judged, list | tuple) and len(judged) != num_stages:
        message = f"{len(judged)} stages judged, but the plan has {num_stages}"
        yield Fault(path="estimate.stages", message=message)


def _stage_faults(path: str, stage: Mapping[str, object]) -> Iterator[Fault]:
    """The rules that one stage keeps alone."""
    yield from _rank_faults(path, stage)
    yield from _replica_faults(path, stage)
    yield from _level_faults(path, stage)


def _rank_faults(path: str, stage: Mapping[str, object]) -> Iterator[Fault]:
    """dp * tp * cp = devices; ep divides dp * cp; sp needs tp."""
    ranks, devices = _ints(stage, "dp", "tp", "cp"), _runs([stage.get("devices")])
    if ranks is None:
        return
    dp, tp, cp = ranks
    if devices and dp * tp * cp != devices[0][1]:
        yield Fault(
            path=f"{path}.devices",
            message=f"dp * tp * cp = {dp} * {tp} * {cp} ranks, "
            f"but the stage has {devices[0][1]} devices",
        )
    ep = _int(stage.get("ep"))
    if ep and dp * cp % ep:
        yield Fault(path=f"{path}.ep", message=f"ep {ep} does not divide dp * cp = {dp * cp}")
    if stage.get("sp") is True and tp == 1:
        yield Fault(path=f"{path}.sp", message="sequence parallelism needs tp > 1")


def _replica_faults(path: str, stage: Mapping[str, object]) -> Iterator[Fault]:
    """dp_replicate divides dp; whoever has copies of the states also divides them."""
    sizes = _ints(stage, "dp", "dp_replicate", "zero")
    if sizes is None or sizes[1] <= 1:
        return
    (dp, copies, zero), where = sizes, f"{path}.dp_replicate"
    if dp % copies:
        yield Fault(path=where, message=f"{copies} copies of the states do not divide dp {dp}")
    elif copies == dp:
        yield Fault(path=where, message=f"a whole copy on each of dp {dp} ranks is zero 0")
    if zero == 0:
        yield Fault(path=where, message="zero 0 has a copy on every rank already; use zero 1 to 3")


def _level_faults(path: str, stage: Mapping[str, object]) -> Iterator[Fault]:
    """A stage has layers, and its memory levels cover all of them."""
    if stage.get("layers") in ([], ()):
        yield Fault(path=f"{path}.layers", message="a stage has at least one run of layers")
    levels = [_int(count) for count in _map(stage.get("memory")).values()]
    num_levels = sum(count for count in levels if count is not None)
    num_layers = sum(count for _, count in _runs(stage.get("layers")))
    if num_layers and None not in levels and num_levels != num_layers:
        yield Fault(
            path=f"{path}.memory",
            message=f"levels cover {num_levels} layers, but the stage has {num_layers}",
        )


def _chunk_faults(stages: _Stages, schedule: Mapping[str, object]) -> Iterator[Fault]:
    """Chunks come with the schedules that take turns among them, one run of layers each."""
    kind, vpp = schedule.get("kind"), _int(schedule.get("vpp"))
    if vpp is None:
        return
    for row in (row for each, row in SCHEDULES.items() if each == kind):
        if vpp > 1 and not row.takes_turns:
            words = f"{kind} runs one chunk per stage, found {vpp}"
            yield Fault(path="schedule.vpp", message=words)
        if vpp < row.least_chunks:
            words = f"{kind} needs at least {row.least_chunks} chunks per stage"
            yield Fault(path="schedule.vpp", message=words)
    for path, stage in stages:
        runs = _runs(stage.get("layers"))
        if runs and len(runs) != vpp:
            words = f"{len(runs)} runs of layers, but the schedule has {vpp} per stage"
            yield Fault(path=f"{path}.layers", message=words)


def _layer_faults(stages: _Stages) -> Iterator[Fault]:
    """The first runs of all stages follow one another from layer 0, then the second ones, ..."""
    runs = [(f"{path}.layers", _runs(stage.get("layers"))) for path, stage in stages]
    expected = 0
    for chunk in range(max((len(own) for _, own in runs), default=0)):
        for path, own in runs:
            for first, count in own[chunk : chunk + 1]:
                if count < 1:
                    yield Fault(path=path, message=f"a run of {count} layers")
                yield from _order_fault(path, (first, count), expected)
                expected = first + count


def _device_faults(stages: _Stages, num_gpus: int | None) -> Iterator[Fault]:
    """Device ranges follow one another from device 0 and cover the cluster."""
    expected = 0
    for path, stage in stages:
        for first, count in _runs([stage.get("devices")]):
            yield from _order_fault(f"{path}.devices", (first, count), expected)
            expected = first + count
    if num_gpus is not None and expected not in (0, num_gpus):
        yield Fault(
            path="cluster.num_gpus",
            message=f"the stages use {expected} devices, the cluster has {num_gpus}",
        )


def _order_fault(path: str, run: tuple[int, int], expected: int) -> Iterator[Fault]:
    """A run [first, count] that does not start where the one before ended."""
    what = path.rpartition(".")[2]
    if run[0] != expected and expected == 0:
        yield Fault(path=path, message=f"{what} {list(run)} do not start at 0")
    elif run[0] != expected:
        verb = "overlap" if run[0] < expected else "leave a gap after"
        yield Fault(
            path=path,
            message=f"{what} {list(run)} {verb} those before, which end at {expected - 1}",
        )


def _batch_faults(
    stages: _Stages, global_batch: int | None, num_micro_batches: int | None
) -> Iterator[Fault]:
    """dp * micro_batch is equal over stages, and times G it is the global batch."""
    samples = [(path, _ints(stage, "dp", "micro_batch")) for path, stage in stages]
    known = [(path, pair[0] * pair[1]) for path, pair in samples if pair]
    for path, count in known[1:]:
        if count != known[0][1]:
            yield Fault(
                path=f"{path}.micro_batch",
                message=f"dp * micro_batch = {count}, but {known[0][1]} in the first stage",
            )
    if known and global_batch and num_micro_batches:
        total = known[0][1] * num_micro_batches
        if total != global_batch:
            yield Fault(
                path="num_micro_batches",
                message=f"dp * micro_batch * num_micro_batches = {known[0][1]} * "
                f"{num_micro_batches} = {total}, but the global batch is {global_batch}",
            )


def even_layers(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers of each stage, the first ones one longer where they do not divide."""
    share, longer = divmod(num_layers, num_stages)
    return tuple(share + (stage < longer) for stage in range(num_stages))


def layers_by_cost(
    num_layers: int, num_stages: int, *, layer_cost: float, ends: Sequence[float]
) -> tuple[int, ...]:
    """Layers of each stage when blocks are dealt out by cost: embedding, layers, head in order.

    A stage is closed when the cost so far reaches its share of the total (nanotron 0.5,
    src/nanotron/models/base.py). `ends`: cost of the embedding and of the head.
    """
    embedding, head = ends
    total = embedding + num_layers * layer_cost + head
    counts, spent, stage = [0] * num_stages, embedding, 0
    for _ in range(num_layers):
        counts[stage] += 1
        spent += layer_cost
        if spent >= total * (stage + 1) / num_stages and stage < num_stages - 1:
            stage += 1
    return tuple(counts)
