"""The question that every command asks, and the job that it becomes."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

from mist.errors import InputError
from mist.model.summary import ModelFacts, ModelLimits
from mist.plans.host_memory import HostNeed
from mist.plans.memory_levels import USUAL
from mist.plans.plan import (
    ClusterRef,
    Estimate,
    Layout,
    Limits,
    ModelRef,
    Plan,
    PricedStages,
    Provenance,
    fullest_host_bytes,
)
from mist.plans.workload import (
    Attention,
    HeadMode,
    MemoryLevel,
    Optimizer,
    Precision,
    Workload,
    refuse_sizes,
)
from mist.platform import Platform, load_platform
from mist.platform.overrides import HOST_MEMORY, Overrides, overrides_of
from mist.rules.combinations import divides, out_of_domain
from mist.rules.rule import broken
from mist.search.state_room import StateRoom
from mist.symbolic.job import Job, make_job
from mist.symbolic.load_programs import Progress, as_it_is, compile_graph, model_programs, quiet
from mist.symbolic.pipeline_costs import loading
from mist.symbolic.program import ModelPrograms
from mist.trace import ConfigSource, TraceSetting, resolve, trace_model
from mist.units import GB, parse_bytes, whole_bytes

if TYPE_CHECKING:
    from torch import nn

    from mist.model.graph import ModelGraph

DEFAULT_SEQ_LEN = 8192
DEFAULT_GLOBAL_BATCH = 256
OBJECT = "object:"  # begins the source of a model that was given as a module, not as a file


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What the user asks about; None stands for the default of the model or device.

    `overrides`: figures that the user sets in place of those of profiles, by name. `levels`: memory
    levels of interest; those that convert layers are priced only where they are asked about; so
    are `heads`, ways to run the last matrix and the loss.
    """

    model: "str | nn.Module"
    num_gpus: int
    gpu: str | None = None
    cluster: str | None = None
    runtime: str = "torch"
    seq_len: int | None = None
    global_batch: int = DEFAULT_GLOBAL_BATCH
    precision: Precision = Precision.BF16
    optimizer: Optimizer = Optimizer.ADAMW
    attention: Attention = Attention.FLASH
    margin_ratio: float | None = None
    overrides: Overrides = field(default_factory=dict)
    levels: tuple[MemoryLevel, ...] = ()
    heads: tuple[HeadMode, ...] = ()
    images: int | None = None
    make_batch: Callable[..., object] | None = None
    loss: Callable[..., object] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.model, str) and (self.make_batch or self.loss):
            raise InputError(
                f"make_batch and loss of {self.model} belong in its file; give them with a module."
            )
        if self.cluster == "":
            raise InputError("--cluster '' is no name. Leave it out for the device's own cluster.")
        if self.margin_ratio is not None and not 0 <= self.margin_ratio < 1:
            raise InputError(f"--margin {self.margin_ratio} is not a share of the memory (0 to 1).")
        refuse_sizes(self.seq_len, self.global_batch)  # before any advice that follows from them


def figures_of(words: Iterable[str], host_memory: str | float | None) -> dict[str, float]:
    """Figures of profiles that `--set` words give, and `--host-memory`, which is short for one.

    `host_memory`: with a unit ("31GB"), or a number of bytes. Raises InputError.
    """
    figures = overrides_of(words)
    if host_memory is None:
        return figures
    if HOST_MEMORY in figures:
        raise InputError(f"--host-memory {host_memory}: --set {HOST_MEMORY} says it too. Give one.")
    try:
        num_bytes = (
            parse_bytes(host_memory) if isinstance(host_memory, str) else whole_bytes(host_memory)
        )
    except ValueError as error:
        raise InputError(f"--host-memory {host_memory}: {error}") from None
    return figures | {HOST_MEMORY: float(num_bytes)}


def prepare(question: Question, progress: Progress = quiet, tp: int = 1) -> Job:
    """Trace the model, load the platform and compile the stage cost.

    `tp`: a degree that the model must allow. Raises InputError for anything in the question that
    cannot be used.
    """
    return job_of(question, compiled(question, progress, tp))


def compiled(
    question: Question, progress: Progress = quiet, tp: int = 1, *, has_room: bool = False
) -> ModelPrograms:
    """The costs of the model under the runtime, for any number of GPUs, sequence and batch.

    From the cache, where they need neither torch nor sympy; else from the trace. `tp`: a degree
    that the model must allow. `has_room`: all its GPUs must have room for the states; raises
    StatesTooLarge before the trace where they have not. Raises InputError.
    """
    platform = platform_of(question)  # refused before the model is traced
    if question.seq_len is not None and isinstance(question.model, str):
        source = resolve(question.model)
        if isinstance(source, ConfigSource):  # of another model it is known once it is loaded
            _refuse_longer(source.name, question.seq_len, source.max_seq_len)
    setting = setting_of(question, platform)
    runtime = platform.runtime
    levels = [level for level in question.levels if level not in USUAL]
    if not isinstance(question.model, str):
        graph = _trace_module(question, setting)
        again = as_it_is(graph, setting, levels)
        return compile_graph(graph, setting, runtime, question.optimizer, again)
    return model_programs(
        question.model,
        setting,
        runtime,
        platform.runtime_hash,
        progress,
        optimizer=question.optimizer,
        refuse=partial(_refuse_beyond, question, platform if has_room else None, tp),
        levels=levels,
        heads=[mode for mode in question.heads if mode is not HeadMode.NONE],
    )


def setting_of(question: Question, platform: Platform) -> TraceSetting:
    """For which kernels the model of a question is traced."""
    return TraceSetting(
        precision=question.precision,
        attention=question.attention,
        policy=platform.device.kernels,
        fused_norms=platform.runtime.kernels.fused_norms,
        seq_len=DEFAULT_SEQ_LEN if question.seq_len is None else question.seq_len,
        images=question.images,
    )


def _trace_module(question: Question, setting: TraceSetting) -> "ModelGraph":
    assert not isinstance(question.model, str)
    return trace_model(question.model, setting, make_batch=question.make_batch, loss=question.loss)


def job_of(question: Question, programs: ModelPrograms) -> Job:
    """The compiled costs on the GPUs of the question. Raises InputError."""
    workload = Workload(
        seq_len=_sequence(programs.facts, question.seq_len),
        global_batch=question.global_batch,
        precision=question.precision,
        optimizer=question.optimizer,
        attention=question.attention,
        compile=False,
        images=programs.facts.images,
    )
    _refuse_shorter(programs.facts, workload.seq_len)
    job = make_job(programs, platform_of(question), workload)
    if outside := out_of_domain(job.cost.domain, workload.seq_len):
        raise InputError(
            f"--seq {workload.seq_len}: {job.facts.name} was traced for {', '.join(outside)} only."
        )
    return job


def _refuse_shorter(facts: ModelFacts, seq_len: int) -> None:
    """Raise InputError for a sample that cannot hold its images and a token of text."""
    if facts.image_tokens >= seq_len:
        raise InputError(
            f"--seq {seq_len}: {facts.images} image(s) of a sample of {facts.name} take "
            f"{facts.image_tokens} tokens, and a text one at least. Try --seq "
            f"{facts.image_tokens + 1} or more, or fewer --images (0: text only)."
        )


def platform_of(question: Question) -> Platform:
    """The platform that a question names.

    Raises PlatformError, and InputError for a precision or a number of GPUs that its runtime does
    not train with.
    """
    platform = load_platform(
        num_gpus=question.num_gpus,
        gpu=question.gpu,
        cluster=question.cluster,
        runtime=question.runtime,
        overrides=question.overrides,
    )
    knobs, name = platform.runtime.knobs, platform.runtime.name
    if question.precision not in knobs.precisions:
        raise InputError(
            f"--precision {question.precision}: runtime {name} trains in "
            f"{' and '.join(knobs.precisions)} (it scales no losses, which fp16 needs). "
            f"Try --precision {knobs.precisions[0]}."
        )
    if question.num_gpus > 1 and not (
        knobs.data_parallel or knobs.tensor_parallel or knobs.schedules
    ):
        raise InputError(
            f"--gpus {question.num_gpus}: runtime {name} trains on one GPU. "
            "Use --gpus 1, or another runtime (mist profiles lists them)."
        )
    return platform


def _sequence(graph: ModelFacts, asked: int | None) -> int:
    longest = graph.max_seq_len
    if asked is None:
        return min(DEFAULT_SEQ_LEN, longest or DEFAULT_SEQ_LEN)
    _refuse_longer(graph.name, asked, longest)
    return asked


def _refuse_beyond(question: Question, room: Platform | None, tp: int, limits: ModelLimits) -> None:
    """Raise InputError for what a model says that it cannot do.

    `room`: what must have room for its states; StatesTooLarge where it has not.
    """
    _refuse_longer(limits.name, question.seq_len, limits.max_seq_len)
    rules = (divides(limit, limits.name) for limit in limits.tp_limits)
    if faults := list(broken(rules, {"tp": tp})):
        raise InputError("\n".join(faults))
    if room is not None:
        StateRoom(
            name=limits.name,
            num_trainable=limits.num_trainable,
            platform=room,
            precision=question.precision,
            optimizer=question.optimizer,
            limits=limits_on(room, question),
        ).refuse()


def _refuse_longer(name: str, asked: int | None, longest: int | None) -> None:
    """Raise InputError for a sequence for which a model has no positions."""
    if asked is not None and longest is not None and asked > longest:
        raise InputError(
            f"--seq {asked}: {name} has positions for {longest} tokens. Use --seq {longest} or "
            "less, or a model with more: max_position_embeddings of a config.json can be raised."
        )


def margin_of(platform: Platform, question: Question) -> float:
    """Share of the device memory that stays free."""
    return platform.margin_ratio if question.margin_ratio is None else question.margin_ratio


def limits_of(job: Job, question: Question) -> Limits:
    """Bytes that a device may hold, and a rank in the memory of its node, under the margin."""
    return limits_on(job.platform, question)


def limits_on(platform: Platform, question: Question) -> Limits:
    """The same of a platform, whatever model is on it."""
    margin = margin_of(platform, question)
    return Limits(
        device_bytes=platform.planned_bytes(margin),
        host_bytes=platform.planned_host_bytes(margin),
    )


def notes_of(job: Job) -> Iterator[str]:
    """What was assumed; what the trace says; what the hardware lacks; machines of one GPU each."""
    platform, workload = job.platform, job.workload
    yield from platform.assumed
    yield from job.facts.notes
    for word in (workload.precision, workload.attention):
        if lack := platform.device.lacks.get(word):
            name = platform.device.name
            yield f"{name} has no {word} in hardware: {lack.instead} ({lack.source})"
    if platform.num_nodes == platform.num_gpus > 1:
        nic = platform.cluster.network.nic_bytes_per_s
        yield (
            f"{platform.num_gpus} GPUs of {platform.cluster.name} are as many machines of one GPU, "
            f"{nic.value / GB:.3g} GB/s apart ({nic.kind}: {nic.source}). For GPUs in one machine "
            "name another --cluster"
        )


def host_need(
    job: Job, layout: Layout, judged: Estimate | PricedStages, limits: Limits
) -> HostNeed:
    """What a layout needs of the memory of its fullest node, under the limits."""
    per_node, memory = job.platform.gpus_per_node, job.platform.host_memory
    held = [stage.host_bytes for stage in judged.stages]
    begun = loading(job, layout)
    drawn_bytes = loading_bytes = None
    if begun is not None:
        ranks_bytes = begun.held_bytes.tolist()
        loading_bytes = round(fullest_host_bytes(layout.stages, ranks_bytes, per_node))
        drawn_bytes = round(begun.drawn_bytes.max())
    return HostNeed(
        held_bytes=round(fullest_host_bytes(layout.stages, held, per_node)),
        loading_bytes=loading_bytes,
        drawn_bytes=drawn_bytes,
        memory_bytes=round(memory.value),
        limit_bytes=round(limits.host_bytes * per_node),
        kind=memory.kind,
        source=memory.source,
    )


def unsearched_plan(job: Job, question: Question, layout: Layout, judged: Estimate) -> Plan:
    """A plan of given stages that nobody searched."""
    graph, platform = job.facts, job.platform
    source = question.model if isinstance(question.model, str) else f"{OBJECT}{graph.name}"
    return Plan(
        model=ModelRef(
            source=source,
            name=graph.name,
            params=graph.num_params,
            trainable=graph.trainable,
            fingerprint=graph.fingerprint,
        ),
        workload=job.workload,
        cluster=ClusterRef(
            name=platform.cluster.name,
            device=platform.device.name,
            num_gpus=platform.num_gpus,
            gpus_per_node=platform.gpus_per_node,
        ),
        runtime=platform.runtime.name,
        schedule=layout.schedule,
        num_micro_batches=layout.num_micro_batches,
        stages=tuple(layout.stages),
        estimate=judged,
        alternatives=(),
        excluded=(),
        provenance=provenance_of(
            job,
            solver="none: written by hand",
            gap=0.0,
            lower_bound_s=0.0,
            search={"margin": margin_of(platform, question)},
        ),
        overrides=dict(question.overrides),
    )


def provenance_of(
    job: Job, *, solver: str, gap: float, lower_bound_s: float, search: dict[str, str | int | float]
) -> Provenance:
    """Versions and profiles behind a plan, and how it was found."""
    return Provenance(
        mist=version("mist-planner"),
        profiles=job.platform.profile_hashes(),
        solver=solver,
        gap=gap,
        lower_bound_s=lower_bound_s,
        search=search,
    )
