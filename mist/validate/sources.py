"""What stands for a source, a GPU and an attention kernel: `profiles/validation/sources.yaml`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Final, Literal

from mist.errors import PlatformError
from mist.files import read_bytes
from mist.plans.numerics import FP8, Numerics
from mist.plans.provenance import Kind
from mist.plans.workload import Attention, HeadMode
from mist.platform.profiles import check, is_path, load_device, load_shipped, read_yaml
from mist.platform.quantity import Quantity, Record
from mist.platform.runtime import Runtime
from mist.validate.measured_runs import Run
from mist.validate.results import MemoryKind

AS_TRACED: Final = Quantity(value=1.0, source="the traced kernels", kind=Kind.SPEC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware(Record):
    """Profiles of a GPU as the files name it."""

    device: str
    cluster: str


@cache
def hardware_named(gpu: str) -> Hardware | None:
    """The device of that name, as --gpu finds it, in its usual cluster; None where none has it."""
    if not gpu or is_path(gpu):
        return None
    try:
        device = load_device(gpu).profile
    except PlatformError:
        return None
    return Hardware(device=device.name, cluster=device.default_cluster)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKernel(Record):
    """An attention kernel as rows name it: what is traced, and times over the traced kernels'."""

    kernel: Attention
    fused_norms: bool = False
    attention_time_scale: Quantity = AS_TRACED
    scores_time_scale: Quantity = AS_TRACED

    def within(self, runtime: Runtime) -> Runtime:
        """The runtime with this kernel."""
        kernels = runtime.kernels
        return replace(
            runtime,
            kernels=replace(
                kernels,
                fused_norms=kernels.fused_norms or self.fused_norms,
                attention_time_scale=kernels.attention_time_scale.times(
                    self.attention_time_scale.value
                ),
                scores_time_scale=kernels.scores_time_scale.times(self.scores_time_scale.value),
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Source(Record):
    """The framework of a source.

    `memory`: what its peaks are. `cluster`: where it is not that of the GPU. `zero`, `checkpoint`:
    where a row says nothing. `offload`: what all its runs have in host memory, in a row's words.
    `head`: how the last matrix and the loss run. `attention`: the kernel that its rows' word means.
    `dropout`: whether its GPT models drop activations out.
    `not_modelled`: why its runs are not predicted, where their rows do not show it.
    `selective_as`: the runtime whose selective checkpointing its rows mean. `recomputed_ratio`: the
    share of whole layers that they mean instead, where a row has no HFU. `nic_bytes_per_s`: of each
    GPU between nodes, by device, where the source says what its network is.
    `reduced_bytes_per_param`: of gradients on their way, where they are not in fp32. `figures`: of
    its device, cluster or runtime, named as in a calibration, where its runs have others.
    `noted`: what stands for runs whose notes have these words; the first that a row has counts.
    """

    runtime: str
    memory: MemoryKind
    cluster: str = ""
    zero: int | None = None
    checkpoint: str = ""
    offload: str = ""
    head: HeadMode = HeadMode.NONE
    attention: str = ""
    dropout: bool = False
    not_modelled: str = ""
    selective_as: str = ""
    recomputed_ratio: Quantity | None = None
    nic_bytes_per_s: Mapping[str, Quantity] = field(default_factory=dict)
    reduced_bytes_per_param: Quantity | None = None
    figures: Mapping[str, Quantity] = field(default_factory=dict)
    noted: Mapping[str, "Source"] = field(default_factory=dict)

    def note_of(self, run: Run) -> str:
        """Which words of `noted` a row has, "" where it has none."""
        return next((words for words in self.noted if words in run.notes), "")

    def within(self, runtime: Runtime, meaning: Runtime) -> Runtime:
        """The runtime as the source's runs use it; `meaning`: whose selective checkpointing."""
        traffic = runtime.traffic
        if self.reduced_bytes_per_param is not None:
            traffic = replace(traffic, reduced_bytes_per_param=self.reduced_bytes_per_param)
        return replace(runtime, selective=meaning.selective, traffic=traffic)


MEGATRON_FSDP: Final = "megatron-fsdp"
# The runtime of a run whose source no table has: the first row whose test it passes.
RUNTIME_OF: Final[tuple[tuple[str, Callable[[Run], bool]], ...]] = (
    ("megatron", lambda run: MEGATRON_FSDP in run.zero_or_fsdp),
    ("fsdp1", lambda run: "fsdp1" in run.zero_or_fsdp),
    ("torch", lambda run: "fsdp" in run.zero_or_fsdp or "hsdp" in run.zero_or_fsdp),
    ("deepspeed-zero3", lambda run: "zero2" in run.zero_or_fsdp or "zero3" in run.zero_or_fsdp),
    # ZeRO-1 or none. Losses in fp16 need a scale, which runtime torch does not have.
    ("megatron", lambda run: (run.tp or 1) * (run.pp or 1) > 1 or run.precision == "fp16"),
    ("torch", lambda run: True),
)


def unlisted(run: Run) -> Source:
    """What stands for the source of a run that the table does not have."""
    runtime = next(name for name, holds in RUNTIME_OF if holds(run))
    return Source(runtime=runtime, memory="reserved")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources(Record):
    """The table."""

    schema: Literal["mist.sources/1"]
    gpus: Mapping[str, Hardware] = field(default_factory=dict)
    attention: Mapping[str, AttentionKernel] = field(default_factory=dict)
    sources: Mapping[str, Source] = field(default_factory=dict)

    def of(self, run: Run) -> Source:
        """What stands for a run; where the table does not have its source, what it says decides."""
        source = self.sources.get(run.source) or unlisted(run)
        return source.noted.get(source.note_of(run), source)

    def hardware(self, gpu: str) -> Hardware | None:
        """What stands for a GPU: a row of the table, else the profile that goes by that name."""
        return self.gpus.get(gpu) or hardware_named(gpu)

    def over(self, other: "Sources") -> "Sources":
        """This table's rows, and those of another that it does not have."""
        return Sources(
            schema=self.schema,
            gpus={**other.gpus, **self.gpus},
            attention={**other.attention, **self.attention},
            sources={**other.sources, **self.sources},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRatios(Record):
    """What the fit of all sources says of each: figures over those of a calibration, by path.

    Of its cluster, and of machines that are faster or slower than others of their kind. `fp8`: of
    runs whose products are in fp8, by source and device.
    """

    schema: Literal["mist.source-ratios/1"]
    source: str
    ratios: Mapping[str, Mapping[str, float]]
    fp8: Mapping[str, Mapping[str, Mapping[str, float]]]

    def of(self, name: str, device: str, numerics: Numerics) -> Mapping[str, float]:
        """The ratios of a source's runs, by the path of the figure."""
        in_fp8 = self.fp8.get(name, {}).get(device, {})
        return in_fp8 if numerics.products == FP8 else self.ratios.get(name, {})


@cache
def load_source_ratios() -> SourceRatios:
    """The shipped table. Raises PlatformError when it is broken."""
    return load_shipped("validation/source_ratios.yaml", SourceRatios)


def load_sources(path: Path | None = None) -> Sources:
    """The shipped table, under the rows of the user's own file if there is one.

    Raises PlatformError when a file is broken.
    """
    shipped = load_shipped("validation/sources.yaml", Sources)
    if path is None:
        return shipped
    own = check(read_yaml(read_bytes(path, PlatformError), path), Sources, path)
    return own.over(shipped)
