"""What stands for a source, a GPU and an attention kernel: `profiles/validation/sources.yaml`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from mist.plans.provenance import Kind
from mist.plans.workload import Attention
from mist.platform.profiles import load_shipped
from mist.platform.quantity import Quantity, Record
from mist.platform.runtime import Runtime
from mist.validate.results import MemoryKind

AS_TRACED: Final = Quantity(value=1.0, source="the traced kernels", kind=Kind.SPEC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware(Record):
    """Profiles of a GPU as the files name it."""

    device: str
    cluster: str


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

    `memory`: what its peaks are. `zero`, `checkpoint`: where a row says nothing. `dropout`:
    whether its GPT models drop activations out. `not_modelled`: why its runs are not predicted,
    where their rows do not show it.
    `selective_as`: the runtime whose selective checkpointing its rows mean. `recomputed_ratio`: the
    share of whole layers that they mean instead, where a row has no HFU. `nic_bytes_per_s`: of each
    GPU between nodes, by device, where the source says what its network is. `network_ratio`: the
    share of that which its cluster reaches, fitted to its runs with the rest of the calibrations.
    `reduced_bytes_per_param`: of gradients on their way, where they are not in fp32.
    """

    runtime: str
    memory: MemoryKind
    zero: int | None = None
    checkpoint: str = ""
    dropout: bool = False
    not_modelled: str = ""
    selective_as: str = ""
    recomputed_ratio: Quantity | None = None
    nic_bytes_per_s: Mapping[str, Quantity] = field(default_factory=dict)
    network_ratio: Quantity | None = None
    reduced_bytes_per_param: Quantity | None = None

    def within(self, runtime: Runtime, meaning: Runtime) -> Runtime:
        """The runtime as the source's runs use it; `meaning`: whose selective checkpointing."""
        traffic = runtime.traffic
        if self.reduced_bytes_per_param is not None:
            traffic = replace(traffic, reduced_bytes_per_param=self.reduced_bytes_per_param)
        return replace(runtime, selective=meaning.selective, traffic=traffic)


UNLISTED: Final = Source(runtime="torch", memory="reserved", checkpoint="none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources(Record):
    """The table."""

    schema: Literal["mist.sources/1"]
    gpus: Mapping[str, Hardware]
    attention: Mapping[str, AttentionKernel]
    sources: Mapping[str, Source]

    def of(self, name: str) -> Source:
        """The source of that name; one that is not listed is taken for runtime torch."""
        return self.sources.get(name, UNLISTED)


def load_sources() -> Sources:
    """The shipped table. Raises PlatformError when it is broken."""
    return load_shipped("validation/sources.yaml", Sources)
