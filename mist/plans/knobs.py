"""The knobs of a stage: one row each, which rules, command line and search loop over.

A knob has one name wherever it is a column or a field of a stage; on the command line it has a
word, and a search space holds its allowed values in a field. All are whole numbers; where plans say
a word in its place, the number is that of the word in `choices`.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from mist.plans.workload import MOST_SAMPLES, HeadMode


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """One knob.

    Args:
        name: of the column of strategies and rules.
        word: on the command line, `--WORD` and `--set WORD=`.
        meaning: what its number is, as `--help` says it.
        least, most: the numbers that mean something; at rest it is the least one.
        of_stage: whether a stage of a plan has a field of this name; else the pipeline has one.
        space: the field of `SearchSpace` with the allowed values; None: no search sets it.
        typed: whether `mist check` takes it; dp follows from the others.
        halves: whether `mist check` tries its half and its double.
        choices: the words of its numbers, from 0 up, where plans and people say words.
    """

    name: str
    word: str
    meaning: str
    least: int = 1
    most: int | None = None
    of_stage: bool = True
    space: str | None = None
    typed: bool = True
    halves: bool = True
    choices: tuple[str, ...] = ()

    @property
    def field(self) -> str:
        """The name of its option in Python."""
        return self.word.replace("-", "_")

    @property
    def counts(self) -> bool:
        """Whether more is more; a ZeRO level is a choice."""
        return self.most is None

    def number_of(self, value: Any) -> int:  # noqa: ANN401 (a number, or a word of it)
        """The number in columns of what a plan says."""
        return self.choices.index(value) if self.choices else int(value)

    def value_of(self, number: int) -> Any:  # noqa: ANN401 (the same)
        """What a plan says for the number in a column."""
        return self.choices[number] if self.choices else number

    def complaint(self, value: int) -> str:
        """What to say of a number that is none of its values."""
        if self.choices:
            return f"is none of {', '.join(self.choices)}"
        if not self.counts:
            return "is not a ZeRO level (0, 1, 2 or 3)"
        return "is not a positive number" if value < 1 else f"is more than {MOST_SAMPLES}"

    def means(self, value: int) -> bool:
        """Whether a number is one of its values."""
        return self.least <= value <= (MOST_SAMPLES if self.most is None else self.most)


KNOBS: Final = (
    Knob(name="tp", word="tp", meaning="Tensor-parallel degree.", space="tp"),
    Knob(name="num_stages", word="pp", meaning="Pipeline stages.", of_stage=False, space="pp"),
    Knob(name="dp", word="dp", meaning="Data-parallel degree.", space="dp", typed=False),
    Knob(
        name="dp_replicate",
        word="dp-replicate",
        meaning="Copies of the states that ZeRO divides (HSDP).",
        space="dp_replicate",
    ),
    Knob(
        name="micro_batch",
        word="micro-batch",
        meaning="Samples per data-parallel rank and micro-step.",
        space="micro_batch",
    ),
    Knob(
        name="chunks",
        word="vpp",
        meaning="Chunks of layers per stage.",
        of_stage=False,
        space="chunks",
        halves=False,
    ),
    Knob(
        name="zero",
        word="zero",
        meaning="ZeRO level, 0 to 3.",
        least=0,
        most=3,
        space="zero",
        halves=False,
    ),
    Knob(
        name="head",
        word="head",
        meaning="How the last matrix and the loss run.",
        least=0,
        most=len(HeadMode) - 1,
        space="head",
        typed=False,
        halves=False,
        choices=tuple(HeadMode),
    ),
    Knob(name="cp", word="cp", meaning="Context-parallel degree.", typed=False),
    Knob(name="ep", word="ep", meaning="Expert-parallel degree.", typed=False),
)

STAGE_KNOBS: Final = tuple(knob for knob in KNOBS if knob.of_stage)
TYPED_KNOBS: Final = tuple(knob for knob in KNOBS if knob.typed)
AT_REST: Final = MappingProxyType({knob.name: knob.least for knob in STAGE_KNOBS})
SEARCHED_KNOBS: Final = MappingProxyType({knob.word: knob for knob in KNOBS if knob.space})
COUNTED_KNOBS: Final = MappingProxyType(
    {w: knob for w, knob in SEARCHED_KNOBS.items() if knob.counts}
)
