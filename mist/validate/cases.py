"""From runs to groups that are predicted together: one model, one machine each."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from types import MappingProxyType
from typing import Final

from mist.plans.numerics import FP8, NUMERICS, Numerics
from mist.plans.plan import Layout, even_layers, layers_by_cost
from mist.plans.workload import Precision
from mist.platform.calibration import Calibration, with_values
from mist.platform.profiles import (
    Loaded,
    find_calibration,
    load_cluster,
    load_device,
    load_runtime,
)
from mist.platform.quantity import Quantity
from mist.platform.runtime import Runtime
from mist.platform.step_interval import expected_error
from mist.trace import ConfigSource, TraceSetting
from mist.validate.measured_runs import Run, StageRun, Stages
from mist.validate.predict import Case, RunProfiles
from mist.validate.run_layouts import check_run, layout_of
from mist.validate.run_models import ADAPTED, Unsupported, architecture_of
from mist.validate.runtime_variants import fully_sharded, with_coded_weights
from mist.validate.sources import (
    MEGATRON_FSDP,
    AttentionKernel,
    Hardware,
    Source,
    Sources,
    load_source_ratios,
)

# Those of runs that are predicted; frozen weights in four bits are named behind them (QLoRA).
PRECISIONS: Final = ("bf16", "fp16", "fp8", "tf32", "nvfp4")
CODED: Final = ("+nf4-weights", "+int4-weights")
TASKS: Final = ("", "pretrain", "sft", *ADAPTED)
# What the constants were fitted to: of others the interval is that of no calibration.
FITTED_PRODUCTS: Final = (*Precision, FP8)
# A compiled layer is launched in about half as many kernels.
COMPILED_LAUNCH_RATIO: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What the runs of a group share; `content` tells configurations apart, `source` origins.

    `origin`: what stands for them; `variant` tells those of one source apart.
    """

    content: str
    config: ConfigSource = field(compare=False)
    setting: TraceSetting
    attention: str
    source: str
    origin: Source = field(compare=False)
    variant: str
    runtime: str
    device: str
    cluster: str
    numerics: Numerics
    coded: bool
    sharded: bool

    @property
    def stock(self) -> Runtime:
        """The runtime as its profile has it, or as these runs use its states."""
        runtime = _runtime(self.runtime).profile
        runtime = with_coded_weights(runtime) if self.coded else runtime
        return fully_sharded(runtime) if self.sharded else runtime

    @property
    def is_fitted(self) -> bool:
        """Whether runs of its kind are among those that constants were fitted to."""
        kept = not (self.coded or self.sharded or self.config.adapter_rank)
        return kept and self.numerics.products in FITTED_PRODUCTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A run of a group."""

    run: Run
    case: Case


@dataclass(frozen=True, slots=True, kw_only=True)
class RunGroup:
    """Runs that are predicted together; `profile_hash` tells their runtime apart in the cache.

    `figures`: the calibrated constants of the source, by path. `step_error`: as of a platform.
    """

    key: Key
    machine: RunProfiles
    profile_hash: str
    figures: Mapping[str, Quantity]
    step_error: Calibration | Quantity
    members: tuple[Member, ...]

    @property
    def calibrated(self) -> bool:
        """Whether constants were fitted to runs of its runtime and device."""
        return bool(self.figures)


def grouped(
    runs: Iterable[Run],
    sources: Sources,
    *,
    calibrated: bool,
    stages: Stages = MappingProxyType({}),
) -> tuple[tuple[RunGroup, ...], dict[str, Unsupported]]:
    """Groups, and why each run that is in none is not supported, by its name.

    `stages`: layers of the stages of runs whose stages are unequal.
    """
    members: dict[Key, list[Member]] = defaultdict(list)
    reasons: dict[str, Unsupported] = {}
    for run in runs:
        try:
            key, case = _case(run, sources, stages.get(run.run_id, ()))
        except Unsupported as reason:
            reasons[run.run_id] = reason
        else:
            members[key].append(Member(run=run, case=case))
    groups = tuple(
        _group(key, tuple(found), sources, calibrated=calibrated) for key, found in members.items()
    )
    return groups, reasons


def _case(run: Run, sources: Sources, stages: tuple[StageRun, ...]) -> tuple[Key, Case]:
    source = sources.of(run)
    if source.not_modelled:
        raise Unsupported(source.not_modelled)
    hardware, attention = _known(run, sources)
    runtime = _runtime(source.runtime).profile
    architecture = architecture_of(run, dropout=source.dropout)
    numerics = NUMERICS[_format(run)]
    key = Key(
        content=architecture.config.content,
        config=architecture.config,
        setting=TraceSetting(
            precision=numerics.compute,
            attention=attention.kernel,
            fused_norms=runtime.kernels.fused_norms or attention.fused_norms,
            compiled=run.compile == "yes",
            head=source.head,
        ),
        attention=source.attention or run.attention_impl,
        source=run.source,
        origin=source,
        variant=repr(source),
        runtime=source.runtime,
        device=hardware.device,
        cluster=source.cluster or hardware.cluster,
        numerics=numerics,
        coded=run.precision.endswith(CODED),
        sharded=MEGATRON_FSDP in run.zero_or_fsdp,
    )
    layout = _layout(run, source, key.stock, architecture.layers, stages)
    num_gpus = run.n_gpus or sum(layout.stages[-1].devices)
    assert run.seq_len is not None
    return key, Case(layout=layout, seq_len=run.seq_len, num_gpus=num_gpus)


def _known(run: Run, sources: Sources) -> tuple[Hardware, AttentionKernel]:
    """What stands for a run's GPU and attention. Raises Unsupported, also for what it trains in."""
    word = sources.of(run).attention or run.attention_impl
    hardware, attention = sources.hardware(run.gpu), sources.attention.get(word)
    if hardware is None:
        raise Unsupported(f"GPU {run.gpu or '(blank)'} has no profile")
    if attention is None:
        raise Unsupported(f"attention {word!r} is not known")
    if _format(run) not in PRECISIONS:
        raise Unsupported(f"precision {run.precision or '(blank)'} is not modelled")
    if run.task not in TASKS:
        raise Unsupported(f"task {run.task} is not modelled")
    device = load_device(hardware.device).profile
    if device.gemm_law(NUMERICS[_format(run)].products) is None:
        raise Unsupported(f"GPU {run.gpu} has no law for {_format(run)}")
    return hardware, attention


def _format(run: Run) -> str:
    """What a run computes in: its precision without the codes of frozen weights."""
    return next(
        (run.precision.removesuffix(word) for word in CODED if run.precision.endswith(word)),
        run.precision,
    )


def _layout(
    run: Run,
    source: Source,
    runtime: Runtime,
    num_layers: int,
    stages: tuple[StageRun, ...],
) -> Layout:
    check_run(run)
    layers = _layers(run, runtime, num_layers, stages)
    # The table of stages says how many layers each one recomputes.
    partial = bool(stages) and run.activation_ckpt in ("", "partial")
    if run.activation_ckpt == "selective" and source.recomputed_ratio is not None:
        share, partial = _recomputed_ratio(run, source.recomputed_ratio.value), True
        layers = [(count, round(share * count)) for count, _ in layers]
    stated = replace(run, activation_ckpt="none") if partial else run
    layout = layout_of(stated, source, layers)
    _check_runtime(layout, runtime)
    return layout


def _recomputed_ratio(run: Run, otherwise: float) -> float:
    """The share of layers that run again, from what the hardware does over what the model needs."""
    if not run.hfu or not run.mfu:
        return otherwise
    # A forward is a third of a step's FLOPs: HFU / MFU = 1 + share / 3.
    return min(3 * (run.hfu / run.mfu - 1), 1.0)


def _check_runtime(layout: Layout, runtime: Runtime) -> None:
    for stage in layout.stages:
        if stage.zero not in runtime.knobs.zero_levels:
            raise Unsupported(f"runtime {runtime.name} has no ZeRO-{stage.zero}")
        for level in set(stage.levels) - set(runtime.levels):
            raise Unsupported(f"{level} checkpointing of runtime {runtime.name} is not known")
        for name, share in asdict(stage.offload).items():
            if share and not runtime.offloads(name):
                raise Unsupported(f"runtime {runtime.name} does not offload {name}")


def _layers(
    run: Run, runtime: Runtime, num_layers: int, stages: tuple[StageRun, ...]
) -> list[tuple[int, int]]:
    """Layers of each stage, and how many of them the table of stages has run again."""
    assert run.pp
    if stages:
        counts = [stage.layers for stage in stages]
        if len(counts) != run.pp or sum(counts) != num_layers:
            raise Unsupported(
                f"stages of {' + '.join(map(str, counts))} layers are not the {num_layers} layers "
                f"on {run.pp} stages"
            )
        return [(stage.layers, stage.checkpointed_layers) for stage in stages]
    if runtime.knobs.layer_split == "by_cost" and run.pp > 1:
        return [(count, 0) for count in _by_cost(run, num_layers, run.pp)]
    return [(count, 0) for count in even_layers(num_layers, run.pp)]


def _by_cost(run: Run, num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers dealt out by the products' parameters, those of the head among them."""
    h, ffn, vocab = run.hidden or 0, run.ffn_hidden or 0, run.vocab or 0
    layer_cost, head = 4 * h * h + 3 * h * ffn, float(h * vocab)
    return layers_by_cost(num_layers, num_stages, layer_cost=layer_cost, ends=(0.0, head))


def _group(
    key: Key, members: tuple[Member, ...], sources: Sources, *, calibrated: bool
) -> RunGroup:
    source = key.origin
    device = load_device(key.device).profile
    calibration = find_calibration(source.runtime, device) if calibrated else None
    values: dict[str, Quantity] = {}
    if calibration is not None:
        ratios = load_source_ratios().of(key.source, key.device, key.numerics)
        values = {
            path: quantity.times(ratios.get(path, 1.0))
            for path, quantity in calibration.profile.values.items()
        }
    words = (_runtime(source.runtime).sha256, key.attention, key.variant,
             str(calibration and calibration.sha256), repr((key.coded, key.sharded)))  # fmt: skip
    machine = machine_of(key, sources, values)
    return RunGroup(
        key=key,
        machine=machine,
        profile_hash="\n".join(words),
        figures=values,
        step_error=(
            calibration.profile
            if calibration and key.is_fitted
            else expected_error(device, machine.runtime)
        ),
        members=members,
    )


def machine_of(key: Key, sources: Sources, values: Mapping[str, Quantity]) -> RunProfiles:
    """The profiles that a group's runs are predicted on, with some figures replaced.

    `values`: named as in a calibration. Raises PlatformError for a figure that is not there.
    """
    source = key.origin
    profiles = (load_device(key.device).profile, load_cluster(key.cluster).profile, key.stock)
    # What a source says of its network, in place of the cluster's figure.
    nic = source.nic_bytes_per_s.get(key.device)
    wired = {"cluster.network.nic_bytes_per_s": nic} if nic else {}
    device, cluster, runtime = with_values(profiles, {**wired, **source.figures, **values})
    runtime = source.within(runtime, _runtime(source.selective_as or source.runtime).profile)
    runtime = _run_with(runtime, sources.attention[key.attention], compiled=key.setting.compiled)
    return RunProfiles(
        device=device,
        cluster=cluster,
        runtime=runtime,
        numerics=key.numerics,
    )


def _run_with(runtime: Runtime, attention: AttentionKernel, *, compiled: bool) -> Runtime:
    """The runtime with a run's attention kernel; compiled graphs fuse all that can be."""
    runtime = attention.within(runtime)
    if not compiled:
        return runtime
    source = "the compiled graph is traced"
    kernels = replace(
        runtime.kernels,
        memory_time_scale=replace(runtime.kernels.memory_time_scale, value=1.0, source=source),
    )
    launch = runtime.host.layer_launch_s
    host = replace(runtime.host, layer_launch_s=launch.times(COMPILED_LAUNCH_RATIO))
    return replace(runtime, kernels=kernels, host=host)


@cache
def _runtime(name: str) -> Loaded[Runtime]:
    return load_runtime(name)
