"""What is measured on each kind of device: large enough to leave caches and launches behind.

A CPU is measured in a minute. A GPU's L2 holds tens of MiB, it takes some microseconds to launch
anything, and it slows down once it is warm.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from mist.plans.workload import Precision
from mist.units import KIB, MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of the readings of one kind of device.

    `gemm`: M, N and K of products, `small_gemm` of precisions that are slow; `probe` tells how fast
    a precision is. `attention`: its precision; `sequences`, `seq_lens`, `head_dims`. `memory_bytes`
    of a tensor of memory-bound kernels and of copies. `num_params` of each of `num_tensors` of the
    optimizer. `collective_bytes`, `sent_bytes`: what passes between ranks. `beside`: width of the
    product, and bytes of the rest, that run at the same time. `between_s`: of products between
    two collectives, as long as a part of a layer takes. `num_readings`: about as many as
    there are. `warm_s`: of products before the first reading.
    """

    gemm: tuple[int, ...]
    small_gemm: tuple[int, ...]
    probe: int
    attention: Precision
    sequences: tuple[int, ...]
    seq_lens: tuple[int, ...]
    head_dims: tuple[int, ...]
    memory_bytes: tuple[int, ...]
    num_params: int
    num_tensors: int
    collective_bytes: tuple[int, ...]
    sent_bytes: tuple[int, ...]
    beside_width: int
    beside_bytes: int
    between_s: float
    num_readings: int
    warm_s: float


UP_TO_16_MIB: Final = tuple(4**i * KIB for i in range(8))

SIZES: Final = MappingProxyType(
    {
        "cpu": Sizes(
            gemm=(32, 128, 512, 2048, 8192),
            small_gemm=(128, 512),
            probe=512,
            attention=Precision.FP32,
            sequences=(4, 32),
            seq_lens=(64, 256, 1024),
            head_dims=(64, 128),
            memory_bytes=(1 * MIB, 4 * MIB, 16 * MIB),
            num_params=1 << 20,
            num_tensors=4,
            collective_bytes=(*UP_TO_16_MIB, 32 * MIB),
            sent_bytes=(16 * KIB, 256 * KIB, 2 * MIB, 8 * MIB),
            beside_width=512,
            beside_bytes=8 * MIB,
            between_s=10e-3,
            num_readings=260,
            warm_s=0.0,
        ),
        "cuda": Sizes(
            gemm=(128, 512, 2048, 8192),
            small_gemm=(512, 2048, 8192),
            probe=4096,
            attention=Precision.BF16,
            sequences=(32, 128),
            seq_lens=(512, 2048, 8192),
            head_dims=(64, 128),
            memory_bytes=(128 * MIB, 256 * MIB, 512 * MIB),
            num_params=1 << 26,
            num_tensors=4,
            collective_bytes=(*UP_TO_16_MIB, 64 * MIB, 256 * MIB, 512 * MIB),
            sent_bytes=(256 * KIB, 2 * MIB, 16 * MIB, 64 * MIB),
            beside_width=4096,
            beside_bytes=256 * MIB,
            between_s=1e-3,
            num_readings=300,
            warm_s=2.0,
        ),
    }
)
"""By the kind of device, as torch names it."""
