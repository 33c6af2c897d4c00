"""In which format a training step computes, and in which it keeps what it trains.

One row for each word of the command line (`--precision`) and of tables of measured runs. Words of a
plan are those of `Precision`; a runtime says which of them it trains in (`knobs.precisions`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from mist.plans.workload import Precision

FP8: Final = "fp8"
TensorFormat = Literal["tf32", "nvfp4"]  # of tensor cores alone
# Bytes of one element that a product reads or writes. tf32: fp32 numbers, of which tensor cores
# take 19 bits. nvfp4: as fp8, whose law has the quantisation of 16-bit numbers in these bytes.
FORMAT_BYTES: Final = MappingProxyType({FP8: 1, "nvfp4": 1, "tf32": 4})
ProductFormat = Precision | Literal["fp8"] | TensorFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """Formats of a step.

    `compute`: of activations and of every operation but matrix products. `products`: of what
    those read. `parameters`: of what the optimizer updates. `gradients`: of what ranks add up.
    """

    compute: Precision
    products: ProductFormat
    parameters: Precision = Precision.FP32
    gradients: Precision = Precision.FP32

    @property
    def product_bytes(self) -> int:
        """Bytes of one element that a matrix product reads or writes."""
        if isinstance(self.products, Precision):
            return self.products.num_bytes
        return FORMAT_BYTES[self.products]


NUMERICS: Final[Mapping[str, Numerics]] = MappingProxyType(
    {
        **{each.value: Numerics(compute=each, products=each) for each in Precision},
        FP8: Numerics(compute=Precision.BF16, products=FP8),
        "nvfp4": Numerics(compute=Precision.BF16, products="nvfp4"),
        "tf32": Numerics(compute=Precision.FP32, products="tf32"),
    }
)
