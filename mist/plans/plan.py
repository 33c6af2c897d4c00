"""The plan: what comes out of the search, and all that crosses to execution and reports.

`mist.plans.file` reads and writes it. Invariants (`plan_faults`): dp * tp * cp ranks are the
devices of a stage; ep divides dp * cp; dp_replicate divides dp, and is 1 or less than dp and from
ZeRO-1 on; dp * micro_batch is equal over stages and times num_micro_batches is the global batch;
the layer runs cover the model once, in order; the devices cover the cluster once; memory levels sum
to the layers. The layers that keep least come first in a stage, and are dealt out over its chunks:
those run backward last, when most else is gone, and the first chunk waits longest.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Final, Literal

from pydantic import Field

from mist.errors import PlanError
from mist.model.summary import MOST_LAYERS
from mist.plans.invariants import plan_faults
from mist.plans.knobs import STAGE_KNOBS
from mist.plans.memory_chance import fit_probability
from mist.plans.memory_levels import LEVELS
from mist.plans.provenance import Kind
from mist.plans.schedules import DEFAULT_KIND
from mist.plans.workload import (
    MOST_GPUS,
    STRICT,
    GpuCount,
    HeadMode,
    MemoryLevel,
    PositiveInt,
    SampleCount,
    ScheduleKind,
    Workload,
)
from mist.units import LARGEST_INTEGER

SCHEMA: Final = "mist.plan/1"

# Products and ratios of numbers within these limits are numbers too.
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e30, le=1e30)]
Seconds = Annotated[Number, Field(ge=0.0)]
StepSeconds = Annotated[Number, Field(ge=1e-12)]  # estimates are rounded to a picosecond
Ratio = Annotated[Number, Field(ge=0.0, le=1.0)]
Bytes = Annotated[int, Field(ge=0, le=LARGEST_INTEGER)]
LayerCount = Annotated[int, Field(le=MOST_LAYERS)]
DeviceCount = Annotated[int, Field(le=MOST_GPUS)]
TimePart = Literal["compute", "tp", "recompute", "launch", "dp", "offload", "p2p"]
MemoryPart = Literal["states", "activations", "working", "gathered", "buffers", "allocator"]
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
    """Which machines."""

    __pydantic_config__ = STRICT
    name: str
    device: str
    num_gpus: GpuCount
    gpus_per_node: GpuCount


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Order of micro-batches in the pipeline; `vpp` model chunks per stage."""

    __pydantic_config__ = STRICT
    kind: ScheduleKind
    vpp: Annotated[int, Field(ge=1, le=MOST_LAYERS)]


DEFAULT_SCHEDULE: Final = Schedule(kind=DEFAULT_KIND, vpp=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offload:
    """Share of each state that lives in host memory (0..1)."""

    __pydantic_config__ = STRICT
    weights: Ratio = 0.0
    grads: Ratio = 0.0
    optimizer: Ratio = 0.0
    activations: Ratio = 0.0


NOTHING_OFFLOADED: Final = Offload()


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One pipeline stage. `layers` are runs [first, count]; `devices` is [first, count].

    `dp_replicate`: copies of the states that ZeRO divides (HSDP): dp / dp_replicate neighbouring
    data-parallel ranks share one, and sum their gradients with the others. A plan file leaves 1
    out.
    """

    __pydantic_config__ = STRICT
    layers: tuple[tuple[LayerCount, LayerCount], ...]
    devices: tuple[DeviceCount, DeviceCount]
    dp: GpuCount
    tp: GpuCount
    sp: bool
    cp: GpuCount
    ep: GpuCount
    micro_batch: SampleCount
    zero: Literal[0, 1, 2, 3]
    head: HeadMode
    memory: dict[MemoryLevel, LayerCount]
    offload: Offload
    dp_replicate: GpuCount = 1

    @property
    def columns(self) -> dict[str, float]:
        """Its knobs (`mist.plans.knobs`) as numbers and its offload ratios, by name."""
        knobs = {knob.name: knob.number_of(getattr(self, knob.name)) for knob in STAGE_KNOBS}
        return knobs | asdict(self.offload)

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
        return sum(n for level, n in self.memory.items() if LEVELS[level].repeats == "all")

    @property
    def num_partly(self) -> dict[str, int]:
        """Layers of which the backward pass runs a part again, by the word of their level."""
        part = (level for level in MemoryLevel if LEVELS[level].repeats == "part")
        return {LEVELS[level].word or level.value: self.num_at(level) for level in part}


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
    time_parts_s: dict[TimePart, Number]
    peak_bytes: Bytes
    usable_bytes: Bytes
    memory_parts_bytes: dict[MemoryPart, int]
    host_bytes: Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncertainty:
    """How far measurements may lie from the prediction, and where that comes from.

    `step_low_ratio`, `step_high_ratio`: ends of the interval of the measured step over the
    predicted one. `memory_ratio`: half width of that of the peak. `calibrated`: whether constants
    were fitted to whole runs of this runtime and device.
    """

    __pydantic_config__ = STRICT
    step_low_ratio: Annotated[Number, Field(gt=0.0)]
    step_high_ratio: Annotated[Number, Field(gt=0.0)]
    memory_ratio: Annotated[Number, Field(ge=0.0)]
    calibrated: bool
    basis: str

    @property
    def step_words(self) -> str:
        """The interval of the step as people read it: "-7% to +18%"."""
        return f"{self.step_low_ratio - 1:+.0%} to {self.step_high_ratio - 1:+.0%}"


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
class PricedStages:
    """What layouts are compared by: seconds of a step, and its stages. `Estimate` says more."""

    step_s: float
    stages: tuple[StageEstimate, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A prediction of one training step, with its parts and what it leaves out.

    `extrapolated`: what lies far outside the table that prices it, a sentence each.
    """

    __pydantic_config__ = STRICT
    step_s: StepSeconds
    tokens_per_s: Number
    mfu: Number
    bubble_s: Seconds
    stages: tuple[StageEstimate, ...]
    uncertainty: Uncertainty
    op_costs: tuple[OpCost, ...]
    extrapolated: tuple[str, ...]
    not_modelled: tuple[str, ...]

    @property
    def fit_probability(self) -> float:
        """The chance, 0..1, that the fullest stage fits its device, without any margin."""
        sure = self.uncertainty.memory_ratio
        # An error of the prediction is of all stages alike: the fullest one decides.
        return min(fit_probability(s.peak_bytes, s.usable_bytes, sure) for s in self.stages)


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
class Regret:
    """How much slower a layout is than the best of each draw, as a ratio: mean and worst."""

    __pydantic_config__ = STRICT
    mean_ratio: Number
    worst_ratio: Number


@dataclass(frozen=True, slots=True, kw_only=True)
class Robustness:
    """How the plan does where figures of the platform are not what the profiles say.

    `median_step_s`, `worst_step_s`: over `num_draws` draws of the uncertain figures.
    `nominal_layout`: the fastest if every figure is right, `nominal_step_s` then, which the plan is
    within `tolerance_ratio` of; its `nominal_regret` beside the plan's own. `turns`: what would
    make another layout the better choice, a sentence each.
    """

    __pydantic_config__ = STRICT
    num_draws: int
    tolerance_ratio: Number
    median_step_s: Seconds
    worst_step_s: Seconds
    regret: Regret
    nominal_layout: str
    nominal_step_s: Seconds
    nominal_regret: Regret
    turns: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What made the plan: versions, profiles, solver, gap, search. No times."""

    __pydantic_config__ = STRICT
    mist: str
    profiles: dict[str, str]
    solver: str
    gap: Number
    lower_bound_s: Number
    search: dict[str, str | Annotated[int, Field(ge=-LARGEST_INTEGER, le=LARGEST_INTEGER)] | Number]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to train a model on a cluster. Raises PlanError with every broken invariant.

    `alternatives` fit; `excluded` are faster and do not fit. `overrides`: figures of the profiles
    that the user set, by name ("cluster.host_memory_bytes"); left out where none is. `robustness`:
    None where the plan was chosen by its predicted step alone, or by hand.
    """

    __pydantic_config__ = STRICT
    schema: Literal["mist.plan/1"] = SCHEMA
    model: ModelRef
    workload: Workload
    cluster: ClusterRef
    runtime: str
    schedule: Schedule
    num_micro_batches: SampleCount
    stages: tuple[StagePlan, ...]
    estimate: Estimate
    alternatives: tuple[Alternative, ...]
    excluded: tuple[Alternative, ...]
    provenance: Provenance
    overrides: dict[str, Number] = field(default_factory=dict)
    robustness: Robustness | None = None

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
