"""Plans made by hand, and any valid plan for hypothesis: what reads plans is tested alone."""

from dataclasses import replace

from hypothesis import strategies as st

from mist.plans.host_memory import HostNeed
from mist.plans.plan import (
    Alternative,
    ClusterRef,
    Estimate,
    Limits,
    ModelRef,
    Offload,
    OpCost,
    Plan,
    Provenance,
    Schedule,
    StageEstimate,
    StagePlan,
    Uncertainty,
)
from mist.plans.provenance import Kind
from mist.plans.workload import (
    Attention,
    HeadMode,
    MemoryLevel,
    Optimizer,
    Precision,
    ScheduleKind,
    Workload,
)
from mist.symbolic.program import MEMORY_PARTS, TIME_PARTS
from mist.units import GIB

LIMITS = Limits(device_bytes=64.0 * GIB, host_bytes=32.0 * GIB)


def host_need(held_gib: int = 0, **changes: object) -> HostNeed:
    """A node of 320 GiB, of which a plan may use 256 GiB: 32 GiB for each of eight ranks."""
    need = HostNeed(
        held_bytes=held_gib * GIB,
        loading_bytes=6 * GIB,
        drawn_bytes=GIB // 2,
        memory_bytes=320 * GIB,
        limit_bytes=256 * GIB,
        kind=Kind.GUESS,
        source="usual servers",
    )
    return replace(need, **changes)  # type: ignore[arg-type]


HOST = host_need()


def stage_plan(first: int = 0, count: int = 8, device: int = 0, **changes: object) -> StagePlan:
    """Eight layers on four GPUs, dp 2 and tp 2, the last layer recomputed."""
    stage = StagePlan(
        layers=((first, count),),
        devices=(device, 4),
        dp=2,
        tp=2,
        sp=True,
        cp=1,
        ep=1,
        micro_batch=2,
        zero=1,
        head=HeadMode.NONE,
        memory={MemoryLevel.NONE: count - 1, MemoryLevel.FULL: 1},
        offload=Offload(),
    )
    return replace(stage, **changes)  # type: ignore[arg-type]


def stage_estimate(stable_s: float = 0.5, peak_gib: int = 40) -> StageEstimate:
    """A stage whose parts sum to its time and its peak."""
    return StageEstimate(
        stable_s=stable_s,
        delta_s=0.25,
        time_parts_s={"compute": 0.75 * stable_s, "tp": 0.25 * stable_s, "dp": 0.0},
        peak_bytes=peak_gib * GIB,
        usable_bytes=72 * GIB,
        memory_parts_bytes={"states": 30 * GIB, "activations": (peak_gib - 30) * GIB},
        host_bytes=0,
    )


def estimate_of(*stages: StageEstimate, step_s: float = 3.0) -> Estimate:
    """A prediction of one step of these stages."""
    return Estimate(
        step_s=step_s,
        tokens_per_s=32 * 2048 / step_s,
        mfu=0.4321,
        bubble_s=0.5,
        stages=stages,
        uncertainty=Uncertainty(
            step_low_ratio=0.75,
            step_high_ratio=1.25,
            memory_ratio=0.1,
            calibrated=False,
            basis="public runs",
        ),
        op_costs=(
            OpCost(what="matrix products", how="law", source="public tables", kind=Kind.FIT),
            OpCost(what="collectives", how="table", source="NCCL", kind=Kind.MEASURED),
        ),
        extrapolated=("all-gathers of 9.0 GiB are far out",),
        not_modelled=("data loading", "stragglers"),
    )


def sample_plan(**changes: object) -> Plan:
    """Two stages of eight layers on eight GPUs: global batch 32 = dp 2 * micro-batch 2 * G 8."""
    plan = Plan(
        model=ModelRef(
            source="models/toy.py", name="toy", params=8_030_261_248, fingerprint="sha256:toy"
        ),
        workload=Workload(
            seq_len=2048,
            global_batch=32,
            precision=Precision.BF16,
            optimizer=Optimizer.ADAMW,
            attention=Attention.FLASH,
            compile=False,
        ),
        cluster=ClusterRef(name="dgx-h100", device="h100-sxm", num_gpus=8, gpus_per_node=8),
        runtime="torch",
        schedule=Schedule(kind=ScheduleKind.ONE_F_ONE_B, vpp=1),
        num_micro_batches=8,
        stages=(stage_plan(), stage_plan(first=8, device=4)),
        estimate=estimate_of(stage_estimate(), stage_estimate(0.25, 48), step_s=5.0),
        alternatives=(
            Alternative(
                layout="pp1 dp8 tp1",
                step_s=6.0,
                peak_bytes=50 * GIB,
                reason="+1.00 s tensor-parallel collectives",
                needs="ties if tensor-parallel collectives took 50.0 % less in both",
            ),
        ),
        excluded=(),
        provenance=Provenance(
            mist="0.1.0",
            profiles={"h100-sxm": "sha256:1", "dgx-h100": "sha256:2", "torch": "sha256:3"},
            solver="by hand",
            gap=0.0,
            lower_bound_s=4.5,
            search={"groups": 3, "margin": 0.12, "restricted": "nothing"},
        ),
    )
    return replace(plan, **changes)  # type: ignore[arg-type]


sizes = st.sampled_from([1, 2, 3, 4, 8])
ratios = st.floats(0.0, 1.0)
seconds = st.floats(0.0, 1e9)
step_seconds = st.floats(1e-12, 1e9)
signed = st.floats(-1e9, 1e9)
num_bytes = st.integers(0, 10**15)
# What YAML may take for a number, a date, a truth value or nothing unless it is quoted.
words = st.one_of(
    st.sampled_from(
        ["1", "1.0", "1e3", "0x1f", "yes", "null", "~", "2024-01-01", "- a", "a: b", ""]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
)


@st.composite
def _stages(draw: st.DrawFn, samples: int, vpp: int) -> tuple[StagePlan, ...]:
    """Stages in order, each with dp * micro_batch = samples and `vpp` runs of layers."""
    num_stages = draw(st.integers(1, 4))
    chunks = [draw(st.integers(1, 6)) for _ in range(num_stages * vpp)]
    starts = [sum(chunks[:i]) for i in range(len(chunks))]
    stages: list[StagePlan] = []
    device = 0
    for i in range(num_stages):
        runs = tuple(zip(starts[i::num_stages], chunks[i::num_stages], strict=True))
        count = sum(chunks[i::num_stages])
        dp = draw(st.sampled_from([d for d in (1, 2, 3, 4, 6, 8) if samples % d == 0]))
        tp, cp = draw(sizes), draw(st.sampled_from([1, 2]))
        num_full, zero = draw(st.integers(0, count)), draw(st.sampled_from([0, 1, 2, 3]))
        copies = [n for n in range(1, dp) if dp % n == 0 and zero > 0] or [1]
        stages.append(
            StagePlan(
                layers=runs,
                devices=(device, dp * tp * cp),
                dp=dp,
                tp=tp,
                sp=tp > 1 and draw(st.booleans()),
                cp=cp,
                ep=draw(st.sampled_from([1, dp * cp])),
                micro_batch=samples // dp,
                zero=zero,
                dp_replicate=draw(st.sampled_from(copies)),
                head=HeadMode.NONE,
                memory={MemoryLevel.NONE: count - num_full, MemoryLevel.FULL: num_full},
                offload=Offload(
                    weights=draw(ratios),
                    grads=draw(ratios),
                    optimizer=draw(ratios),
                    activations=draw(ratios),
                ),
            )
        )
        device += dp * tp * cp
    return tuple(stages)


schedules = st.sampled_from(
    [
        Schedule(kind=ScheduleKind.ONE_F_ONE_B, vpp=1),
        Schedule(kind=ScheduleKind.GPIPE, vpp=1),
        Schedule(kind=ScheduleKind.INTERLEAVED, vpp=2),
        Schedule(kind=ScheduleKind.ZERO_BUBBLE, vpp=2),
    ]
)

_stage_estimates = st.builds(
    StageEstimate,
    stable_s=seconds,
    delta_s=signed,
    time_parts_s=st.dictionaries(st.sampled_from(TIME_PARTS), signed, max_size=4),
    peak_bytes=num_bytes,
    usable_bytes=num_bytes,
    memory_parts_bytes=st.dictionaries(st.sampled_from(MEMORY_PARTS), num_bytes, max_size=4),
    host_bytes=num_bytes,
)


_op_costs = st.builds(
    OpCost,
    what=words,
    how=st.sampled_from(["law", "table", "measured"]),
    source=words,
    kind=st.sampled_from(Kind),
)


@st.composite
def _estimates(draw: st.DrawFn, num_stages: int) -> Estimate:
    return Estimate(
        step_s=draw(step_seconds),
        tokens_per_s=draw(seconds),
        mfu=draw(ratios),
        bubble_s=draw(seconds),
        stages=tuple(draw(_stage_estimates) for _ in range(num_stages)),
        uncertainty=Uncertainty(
            step_low_ratio=1 - draw(ratios) / 2,
            step_high_ratio=1 + draw(ratios),
            memory_ratio=draw(ratios),
            calibrated=draw(st.booleans()),
            basis=draw(words),
        ),
        op_costs=tuple(draw(st.lists(_op_costs, max_size=2))),
        extrapolated=tuple(draw(st.lists(words, max_size=2))),
        not_modelled=tuple(draw(st.lists(words, max_size=3))),
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any plan that keeps the invariants."""
    samples, num_micro_batches = draw(st.sampled_from([1, 2, 4, 6, 8, 24])), draw(sizes)
    schedule = draw(schedules)
    stages = draw(_stages(samples, schedule.vpp))
    alternatives = st.builds(
        Alternative,
        layout=words,
        step_s=seconds,
        peak_bytes=num_bytes,
        reason=words,
        needs=words,
    )
    return Plan(
        model=ModelRef(
            source=draw(words),
            name=draw(words),
            params=draw(st.integers(1, 10**13)),
            fingerprint=draw(words),
        ),
        workload=Workload(
            seq_len=draw(st.integers(1, 10**6)),
            global_batch=samples * num_micro_batches,
            precision=draw(st.sampled_from(Precision)),
            optimizer=Optimizer.ADAMW,
            attention=draw(st.sampled_from(Attention)),
            compile=draw(st.booleans()),
        ),
        cluster=ClusterRef(
            name=draw(words),
            device=draw(words),
            num_gpus=sum(stage.devices[1] for stage in stages),
            gpus_per_node=draw(sizes),
        ),
        runtime=draw(words),
        schedule=schedule,
        num_micro_batches=num_micro_batches,
        stages=stages,
        estimate=draw(_estimates(len(stages))),
        alternatives=tuple(draw(st.lists(alternatives, max_size=2))),
        excluded=tuple(draw(st.lists(alternatives, max_size=1))),
        provenance=Provenance(
            mist=draw(words),
            profiles=draw(st.dictionaries(words, words, max_size=3)),
            solver=draw(words),
            gap=draw(signed),
            lower_bound_s=draw(seconds),
            search=draw(
                st.dictionaries(
                    words, words | st.integers(-(2**63) + 1, 2**63 - 1) | signed, max_size=4
                )
            ),
        ),
    )
