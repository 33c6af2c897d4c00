"""What is asked: the workload, and the words of each choice."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final

from pydantic import ConfigDict, Field

from mist.errors import InputError
from mist.units import LARGEST_INTEGER

STRICT: Final = ConfigDict(extra="forbid")  # an unknown key of a plan file is a fault

# Nobody has more. Within these limits every product of sizes is exact in 64 bits, and every loop
# over GPUs, layers or divisors of the batch ends at once.
MOST_GPUS: Final = 2**20
MOST_SAMPLES: Final = 2**32
MOST_TOKENS: Final = 2**30
MOST_IMAGES: Final = 2**16  # of a sample

PositiveInt = Annotated[int, Field(ge=1, le=LARGEST_INTEGER)]
GpuCount = Annotated[int, Field(ge=1, le=MOST_GPUS)]
SampleCount = Annotated[int, Field(ge=1, le=MOST_SAMPLES)]


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
    TEMPO = "tempo"
    DROP_ACTIVATION = "drop-activation"
    DROP_NORM = "drop-norm"
    SELECTIVE = "selective"
    SAC_HALF = "sac-half"
    SDPA_ONLY = "sdpa-only"
    FULL = "full"

    @property
    def column(self) -> str:
        """Its name in columns and formulas, where words are names of Python."""
        return self.value.replace("-", "_")


class HeadMode(StrEnum):
    """How the last matrix and the loss run: `mist.layers.loss_heads`.

    NONE: all logits at once, as the model has it. CHECKPOINTED: some at a time, and again in the
    backward pass. IN_FORWARD: some at a time, and their gradients with them.
    """

    NONE = "none"
    CHECKPOINTED = "checkpointed"
    IN_FORWARD = "in-forward"


class Solver(StrEnum):
    """What joins stages: the exact dynamic program, the mixed-integer program, or both."""

    DP = "dp"
    MILP = "milp"
    BOTH = "both"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What one training step does: `global_batch` samples of `seq_len` tokens.

    `images`: of a sample, where the model looks at images that its texts hold; else None. Raises
    InputError when a size is not positive.
    """

    __pydantic_config__ = STRICT
    seq_len: Annotated[int, Field(ge=1, le=MOST_TOKENS)]
    global_batch: SampleCount
    precision: Precision
    optimizer: Optimizer
    attention: Attention
    compile: bool
    images: Annotated[int, Field(ge=0, le=MOST_IMAGES)] | None = None

    def __post_init__(self) -> None:
        refuse_sizes(self.seq_len, self.global_batch)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees."""
        return self.global_batch * self.seq_len


def refuse_sizes(seq_len: int | None, global_batch: int) -> None:
    """Raise InputError for a sequence (tokens; None: not known) or batch that nobody has."""
    for name, size, most in (
        ("--seq", seq_len, MOST_TOKENS),
        ("--global-batch", global_batch, MOST_SAMPLES),
    ):
        if size is not None and size < 1:
            raise InputError(f"{name} {size} is not a positive number of samples or tokens.")
        if size is not None and size > most:
            raise InputError(f"{name} {size} is more than Mist plans for. Use at most {most}.")


def batches_near(batch: int, step: int) -> tuple[int, ...]:
    """The multiples of `step` next to `batch`, below and above, that a global batch may be."""
    below = batch // step * step
    return tuple(each for each in (below, below + step) if 1 <= each <= MOST_SAMPLES)
