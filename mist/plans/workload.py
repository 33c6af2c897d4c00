"""What is asked: the workload, and the words of each choice."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final

from pydantic import ConfigDict, Field

from mist.errors import InputError

STRICT: Final = ConfigDict(extra="forbid")  # an unknown key of a plan file is a fault

PositiveInt = Annotated[int, Field(ge=1)]


class Precision(StrEnum):
    """Compute precision. Parameters and gradients are reduced in fp32 under bf16 and fp16."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"

    @property
    def num_bytes(self) -> int:
        """Bytes of one element in this precision."""
        return 4 if self is Precision.FP32 else 2


class Optimizer(StrEnum):
    """Optimizers whose states the runtimes have figures for."""

    ADAMW = "adamw"


class Attention(StrEnum):
    """Attention kernel that the trace assumes on the GPU."""

    FLASH = "flash"
    MATH = "math"


class ScheduleKind(StrEnum):
    """Order in which pipeline stages run micro-batches forward and backward.

    GPIPE: all forward, then all backward. ONE_F_ONE_B: one of each in turn. INTERLEAVED: the same
    with several chunks of layers on every stage. ZERO_BUBBLE: weight gradients fill the bubbles.
    """

    GPIPE = "gpipe"
    ONE_F_ONE_B = "1f1b"
    INTERLEAVED = "interleaved"
    ZERO_BUBBLE = "zero-bubble"


class MemoryLevel(StrEnum):
    """How much of a layer's activation is kept, from most to least: `mist.plans.memory_levels`."""

    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"


class Solver(StrEnum):
    """What joins stages: the exact dynamic program, the mixed-integer program, or both."""

    DP = "dp"
    MILP = "milp"
    BOTH = "both"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What one training step does: `global_batch` samples of `seq_len` tokens.

    Raises InputError when a size is not positive.
    """

    __pydantic_config__ = STRICT
    seq_len: PositiveInt
    global_batch: PositiveInt
    precision: Precision
    optimizer: Optimizer
    attention: Attention
    compile: bool

    def __post_init__(self) -> None:
        for name, size in (("--seq", self.seq_len), ("--global-batch", self.global_batch)):
            if size < 1:
                raise InputError(f"{name} {size} is not a positive number of samples or tokens.")

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees."""
        return self.global_batch * self.seq_len
