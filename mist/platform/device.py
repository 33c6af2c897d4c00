"""A device: what one GPU (or CPU) computes, moves and holds. Mirrors `profiles/devices/*.yaml`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from mist.model.summary import Traffic
from mist.plans.numerics import FP8, ProductFormat, TensorFormat
from mist.plans.provenance import Kind
from mist.plans.workload import Attention, Precision
from mist.platform.op_tables import Tables, check_columns
from mist.platform.quantity import Quantity, Record


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmLaw(Record):
    """Time of a matrix product from its FLOPs and bytes; the equation is in `op_times.gemm_s`.

    `peak_flop_per_s` is the dense datasheet peak, `efficiency_ratio` what large shapes reach of it.
    `bandwidth_scale` multiplies the HBM bandwidth (above 1 it is a curvature of the fit, not a
    bandwidth), `exponent` sharpens the bend between the two regimes, `launch_s` is added to both.
    """

    not_zero: ClassVar = ("peak_flop_per_s", "efficiency_ratio", "bandwidth_scale")
    exponents: ClassVar = ("exponent",)
    peak_flop_per_s: Quantity
    efficiency_ratio: Quantity
    bandwidth_scale: Quantity
    launch_s: Quantity
    exponent: Quantity


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLaw(Record):
    """Time of the flash attention kernel for one head size; the equation is in `op_times`.

    `efficiency_ratio` is what very long sequences reach of the matrix peak, `half_rate_tokens` the
    causal sequence length at which half of that is reached.
    """

    not_zero: ClassVar = ("efficiency_ratio",)
    head_dim: int
    efficiency_ratio: Quantity
    half_rate_tokens: Quantity
    launch_s: Quantity


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashAttention(Record):
    """Flash attention on a device: laws by head size, and what all head sizes share.

    backward / forward = `backward_ratio` + `backward_ramp_tokens` / seq_k, for seq_k from
    `backward_min_tokens` up. Without a causal mask the ramp is shorter: half_rate_tokens times
    `full_mask_ramp_ratio`.
    """

    kernel: str
    laws: tuple[AttentionLaw, ...]
    full_mask_ramp_ratio: Quantity
    backward_ratio: Quantity
    backward_ramp_tokens: Quantity
    backward_min_tokens: Quantity

    def __post_init__(self) -> None:
        sizes = [law.head_dim for law in self.laws]
        if not sizes or sizes != sorted(set(sizes)):
            raise ValueError(f"laws must rise in head_dim and be at least one, found {sizes}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BandwidthRatios(Record):
    """Share of the HBM bandwidth that each class of memory-bound operation reaches (0..1).

    The fields are the words of `mist.model.graph.Traffic`.
    """

    not_zero: ClassVar = (
        "pointwise",
        "reduction",
        "norm_forward",
        "norm_backward",
        "softmax",
        "gather",
    )
    pointwise: Quantity
    reduction: Quantity
    norm_forward: Quantity
    norm_backward: Quantity
    softmax: Quantity
    gather: Quantity

    def of(self, traffic: Traffic) -> float:
        """The ratio of one class."""
        quantity: Quantity = getattr(self, traffic)
        return quantity.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Lack(Record):
    """What a device cannot do though software offers it: `instead`, what happens then."""

    instead: str
    source: str
    kind: Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Device(Record):
    """One kind of device.

    `memory_bytes` is what the CUDA runtime reports as total, never the nominal size;
    `context_bytes` is lost to the CUDA context and NCCL. `kernel_launch_s` is added per
    memory-bound kernel. `tensor_time_scale` multiplies the time of matrix products and attention:
    the one factor that calibration fits (sustained clocks against the bursts that tables measure).
    `tensor_flop_per_s`: peaks of products in formats that have no law of their own.
    `tables`: measured times, which take the place of the law of their operation and precision.
    `kernels`: whose kernels run, and so what a model is traced for. `lacks`: precisions and kernels
    of attention that the hardware has not, by name. `chip`: another device with the same one, whose
    calibrations hold for this one too.
    """

    not_zero: ClassVar = (
        "memory_bytes",
        "hbm_bytes_per_s",
        "host_to_device_bytes_per_s",
        "device_to_host_bytes_per_s",
        "tensor_time_scale",
    )
    schema: Literal["mist.device/1"]
    name: str
    what: str
    default_cluster: str
    memory_bytes: Quantity
    context_bytes: Quantity
    hbm_bytes_per_s: Quantity
    kernel_launch_s: Quantity
    host_to_device_bytes_per_s: Quantity
    device_to_host_bytes_per_s: Quantity
    tensor_time_scale: Quantity
    bandwidth_ratio: BandwidthRatios
    gemm: Mapping[Precision, GemmLaw]
    gemm_fp8: GemmLaw | None
    tensor_flop_per_s: Mapping[TensorFormat, Quantity] = field(default_factory=dict)
    flash_attention: FlashAttention
    tables: Tables = field(default_factory=dict)
    kernels: Literal["cuda", "cpu"] = "cuda"
    lacks: Mapping[Precision | Attention, Lack] = field(default_factory=dict)
    chip: str = ""

    def __post_init__(self) -> None:
        Record.__post_init__(self)
        check_columns(self.tables)
        absent = [precision.value for precision in Precision if precision not in self.gemm]
        if absent:
            raise ValueError(f"gemm lacks a law for {', '.join(absent)}")
        if self.context_bytes.value >= self.memory_bytes.value:
            raise ValueError("context_bytes leaves nothing of memory_bytes")

    @property
    def usable_bytes(self) -> float:
        """Memory that the allocator can reserve: reported total less the context."""
        return self.memory_bytes.value - self.context_bytes.value

    def gemm_law(self, products: ProductFormat) -> GemmLaw | None:
        """The law of matrix products in a format; None where it is not known.

        Those of `tensor_flop_per_s` have the law of a format of their size, at their own rate.
        """
        if isinstance(products, Precision):
            return self.gemm[products]
        if products == FP8:
            return self.gemm_fp8
        like = self.gemm[Precision.BF16] if products == "tf32" else self.gemm_fp8
        rate = self.tensor_flop_per_s.get(products)
        return None if like is None or rate is None else replace(like, peak_flop_per_s=rate)

    @property
    def is_measured(self) -> bool:
        """Whether the matrix law comes from measurements of this part (not from its datasheet)."""
        return self.gemm[Precision.BF16].efficiency_ratio.kind is not Kind.GUESS
