"""What is known of a traced model in plain numbers and words: all but its costs.

No expressions here (those are in `mist.model.graph`), so that what reads these facts needs no
sympy.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

MOST_LAYERS: Final = 65_536


class Traffic(StrEnum):
    """Class of a memory-bound operation: each reaches its own share of the device's bandwidth."""

    POINTWISE = "pointwise"
    REDUCTION = "reduction"
    NORM_FORWARD = "norm_forward"
    NORM_BACKWARD = "norm_backward"
    SOFTMAX = "softmax"
    GATHER = "gather"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRun:
    """`count` consecutive layers that are the block number `block`."""

    block: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TpLimit:
    """A size that the tensor-parallel degree must divide: "key/value heads", 8."""

    label: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Sequence lengths [tokens] that a trace holds for: one regime of a model.

    They are the multiples of `multiple` from `first` to `last` (None: without end).
    """

    first: int = 1
    last: int | None = None
    multiple: int = 1

    def __post_init__(self) -> None:
        """Raise ValueError where there is no such length."""
        if self.first < 1 or self.multiple < 1 or (self.last is not None and self.last < 1):
            raise ValueError(f"{self} are no lengths")

    @property
    def is_one(self) -> bool:
        """Whether it is a single length."""
        return self.first == self.last

    def __contains__(self, seq_len: int) -> bool:
        within = self.first <= seq_len and (self.last is None or seq_len <= self.last)
        return within and seq_len % self.multiple == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What a model says of itself before it is traced: its size, positions, heads it divides.

    `num_trainable`: parameters that have a gradient. `tp_limits`: of those that its trace finds the
    heads, where the model's own plan divides them.
    """

    name: str
    num_trainable: int
    max_seq_len: int | None
    tp_limits: tuple[TpLimit, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A model by name, size and shape.

    `num_trainable`: parameters that have a gradient, of all `num_params`.
    `layers`: runs of block numbers. `tp_limits` is None when no tensor-parallel rules are known for
    the model: t must be 1. `undivided`: where they are known, why `mist apply` cannot divide it by
    them; None if it can. `sequential`: each layer takes only what the one before gives or passes
    on; without it there is one pipeline stage. `unstaged`: why `mist apply` cannot divide it over
    stages; `whole_sequence`: why it leaves the sequence whole under tensor parallelism; None if it
    divides them. `calls_again`: layers are called again with the parameters that they have.
    `fingerprint` identifies the model (names and shapes of parameters, runs, ties), not the trace.
    `precision`: the one that was traced. `lengths`: the sequence lengths that it was traced for.
    `images`: of a sample, where the model looks at images that texts hold, else None;
    `image_tokens`: how many tokens of a sample stand for them.
    """

    name: str
    num_params: int
    num_trainable: int
    layers: tuple[LayerRun, ...]
    tied: bool
    max_seq_len: int | None
    tp_limits: tuple[TpLimit, ...] | None
    sequential: bool
    precision: str
    fingerprint: str
    notes: tuple[str, ...]
    undivided: str | None = None
    unstaged: str | None = None
    whole_sequence: str | None = None
    calls_again: bool = False
    lengths: Lengths = Lengths()
    images: int | None = None
    image_tokens: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for counts that no model has."""
        if not 0 <= self.num_trainable <= self.num_params:
            raise ValueError(f"{self.num_trainable} of {self.num_params} parameters")
        if not self.layers or min(run.count for run in self.layers) < 1:
            raise ValueError("a run without layers")
        if self.num_layers > MOST_LAYERS:
            raise ValueError(f"{self.num_layers} layers, above {MOST_LAYERS}")
        if {run.block for run in self.layers} != set(range(self.num_kinds)):
            raise ValueError("layers of blocks that there are not")
        sizes = (self.max_seq_len, *(limit.size for limit in self.tp_limits or ()))
        if any(size is not None and size < 1 for size in sizes):
            raise ValueError(f"limits of {sizes}")

    @property
    def limits(self) -> ModelLimits:
        """What it cannot do, as known before it is priced."""
        return ModelLimits(
            name=self.name,
            num_trainable=self.num_trainable,
            max_seq_len=self.max_seq_len,
            tp_limits=self.tp_limits or (),
        )

    @property
    def trainable(self) -> int | None:
        """Parameters that have a gradient; None where all have, as plan files say it."""
        # Plan files write the number only where something is frozen.
        return None if self.num_trainable == self.num_params else self.num_trainable

    @property
    def num_layers(self) -> int:
        """Number of layers that pipeline stages divide among them."""
        return sum(run.count for run in self.layers)

    @property
    def num_kinds(self) -> int:
        """Number of distinct blocks."""
        return 1 + max(run.block for run in self.layers)

    def layer_kinds(self) -> tuple[int, ...]:
        """The block number of every layer, in order."""
        return tuple(run.block for run in self.layers for _ in range(run.count))


def trained_words(num_params: int, num_trainable: int) -> str:
    """What follows a number of parameters where not all are trained: ", 1,024 of them trained"."""
    return f", {num_trainable:,} of them trained" if num_trainable < num_params else ""


def difference_words(planned: tuple[int, int], other: tuple[int, int]) -> tuple[str, str]:
    """What follows the parameters of a plan's model and those of another one that was found.

    Args:
        planned: number of parameters of the plan's model, and how many of them are trained.
        other: the same of the other one.
    """
    if planned == other:
        return "", " too, with other names, shapes or ties, or trains other ones"
    return trained_words(*planned), trained_words(*other)
