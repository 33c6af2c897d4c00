"""Which values of each knob a search may use: the tables of `--space`, and what narrows them.

A space is a table of allowed values; what a runtime cannot express is taken out of it later
(`mist.pareto.strategies`), and everything that a user narrows is written down for the plan.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mist.errors import InputError
from mist.plans.knobs import COUNTED_KNOBS, SEARCHED_KNOBS, Knob
from mist.plans.memory_levels import KEEPS_ALL, SEARCHED, USUAL, levels_that
from mist.plans.schedules import DEFAULT_KIND
from mist.plans.workload import HeadMode, MemoryLevel, ScheduleKind
from mist.units import parse_whole

OFFLOADED: Final = ("weights", "grads", "optimizer", "activations")
"""What may live in host memory: the fields of `mist.plans.plan.Offload`."""

_COARSE: Final = (0.0, 0.25, 0.375, 0.5, 0.75, 1.0)
_FINE: Final = (0.0, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
PAPER_RATIOS: Final = MappingProxyType(
    dict(zip(OFFLOADED, (_COARSE, _COARSE, _FINE, _FINE), strict=True))
)
"""Ratios that the artifact of the Mist paper searches (EuroSys'25): 1,984 tuples, as it offloads
weights only where it offloads gradients too."""
NO_RATIOS: Final = MappingProxyType(dict.fromkeys(OFFLOADED, (0.0,)))
ALL_OR_NOTHING: Final = MappingProxyType(
    dict(zip(OFFLOADED, ((0.0, 1.0),) * 3 + ((0.0,),), strict=True))
)


CHECKPOINTS: Final = MappingProxyType({level.value: level for level in MemoryLevel})
"""The memory levels by the words of `--checkpoint`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """The allowed values of each knob; None leaves a knob to the runtime's own limits.

    `levels`: the memory levels that layers may have; `some_layers`: whether a stage may mix two of
    them. `head`: how the last matrix and the loss may run. `offload`: ratios by state.
    `schedules`, and `chunks` (v) of a stage: 1, or more of those that take turns.
    `dp_replicate`: copies of the states that ZeRO divides (HSDP).
    `unlike_stages`: whether stages may differ in anything and share layers unevenly;
    `unequal_meshes`: also in their number of devices. `refines`: whether the best layout's ratios
    may lie between those of `offload` in the end (`mist.search.refine_offload`). `most`: upper
    limits by knob, and of the ratios of whole layers that plans round up. `restrictions`: what was
    narrowed. Raises InputError for a value that no plan can have.
    """

    name: str = "plain"
    tp: tuple[int, ...] | None = None
    pp: tuple[int, ...] | None = None
    dp: tuple[int, ...] | None = None
    micro_batch: tuple[int, ...] | None = None
    zero: tuple[int, ...] = (0, 1, 2, 3)
    head: tuple[HeadMode, ...] = (HeadMode.NONE,)
    levels: tuple[MemoryLevel, ...] = USUAL
    some_layers: bool = True
    offload: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: PAPER_RATIOS)
    schedules: tuple[ScheduleKind, ...] = tuple(ScheduleKind)
    chunks: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
    dp_replicate: tuple[int, ...] | None = None
    unlike_stages: bool = True
    unequal_meshes: bool = False
    refines: bool = True
    most: Mapping[str, float] = field(default_factory=dict)
    restrictions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for knob in SEARCHED_KNOBS.values():
            for value in self.values_of(knob) or ():
                if not knob.means(value):
                    raise InputError(f"{knob.space} {value} {knob.complaint(value)}.")
        if not self.levels:
            *words, last = MemoryLevel
            raise InputError(f"no memory level is left: allow {', '.join(words)} or {last}.")
        _check_ratios(self.offload)

    def values_of(self, knob: Knob) -> tuple[int, ...] | None:
        """The allowed numbers of a knob; None where the runtime decides."""
        assert knob.space is not None
        values: tuple[Any, ...] | None = getattr(self, knob.space)
        return None if values is None else tuple(map(knob.number_of, values))

    def allows(self, name: str, values: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which values of "tp", "pp", "dp", "micro_batch" or "chunks" may be used."""
        allowed, most = getattr(self, name), self.most.get(name)
        kept = np.ones(values.shape, dtype=np.bool_)
        if allowed is not None:
            kept &= np.isin(values, allowed)
        return kept if most is None else kept & (values <= most)


def _check_ratios(offload: Mapping[str, tuple[float, ...]]) -> None:
    for name, ratios in offload.items():
        if name not in OFFLOADED:
            raise InputError(f"offload {name} is none of {', '.join(OFFLOADED)}.")
        if bad := [ratio for ratio in ratios if not 0 <= ratio <= 1]:
            raise InputError(f"offload {name} {bad[0]:g} is not a ratio from 0 to 1.")


_ALIKE: Final = (DEFAULT_KIND,)
ALL_OR_NONE: Final = levels_that(lambda row: row.repeats != "part")

DEFAULT: Final = "mist"
"""The space that is searched where none is named."""

SPACES: Final[Mapping[str, SearchSpace]] = MappingProxyType(
    {
        space.name: space
        for space in (
            SearchSpace(
                name="3d",
                dp_replicate=(1,),
                zero=(0, 1),
                levels=ALL_OR_NONE,
                some_layers=False,
                offload=NO_RATIOS,
                schedules=_ALIKE,
                unlike_stages=False,
            ),
            SearchSpace(
                name="megatron",
                dp_replicate=(1,),
                zero=(0, 1),
                offload=NO_RATIOS,
                schedules=(DEFAULT_KIND, ScheduleKind.INTERLEAVED),
                unlike_stages=False,
            ),
            SearchSpace(
                name="deepspeed",
                dp_replicate=(1,),
                pp=(1,),
                levels=ALL_OR_NONE,
                some_layers=False,
                offload=ALL_OR_NOTHING,
                schedules=_ALIKE,
                unlike_stages=False,
            ),
            SearchSpace(
                name="fsdp",
                tp=(1,),
                pp=(1,),
                zero=(2, 3),
                some_layers=False,
                offload=NO_RATIOS,
                schedules=_ALIKE,
                unlike_stages=False,
            ),
            SearchSpace(
                name="aceso",
                dp_replicate=(1,),
                zero=(0, 1),
                levels=ALL_OR_NONE,
                offload=NO_RATIOS,
                schedules=_ALIKE,
            ),
            SearchSpace(name="paper", dp_replicate=(1,), schedules=_ALIKE, refines=False),
            SearchSpace(
                name="paper+tempo",
                levels=(KEEPS_ALL, MemoryLevel.TEMPO, *USUAL[1:]),
                dp_replicate=(1,),
                schedules=_ALIKE,
                refines=False,
            ),
            SearchSpace(name="plain"),
            SearchSpace(name=DEFAULT, levels=SEARCHED),
            SearchSpace(name="mist+heads", levels=SEARCHED, head=tuple(HeadMode)),
            SearchSpace(name="whole", unequal_meshes=True),
        )
    }
)
"""What other planners and frameworks can vary.

"paper" is what the Mist paper searches, "paper+tempo" adds Tempo's level. "plain" adds the other
schedules to "paper"; "mist" adds to it the levels that no mix of others is as good as, "mist+heads"
to that heads without all logits at once, and "whole" to "plain" stages of unequal size.
"""


def space_of(name: str) -> SearchSpace:
    """A space by its name. Raises InputError for an unknown one."""
    if name not in SPACES:
        raise InputError(f"--space {name} is not known. Known: {', '.join(SPACES)}.")
    return SPACES[name]


def narrowed(
    space: SearchSpace, *, fixed: Iterable[str], most: Iterable[str], forbid: Iterable[str]
) -> SearchSpace:
    """A space with what the user fixes ("tp=2"), limits ("pp=8") and forbids ("offload").

    Raises InputError for what cannot be read, or is set twice.
    """
    space = replace(space, restrictions=(*_of_space(space), *space.restrictions))
    known: set[str] = set()
    for word in fixed:
        key, _, value = word.partition("=")
        knob = key.replace("_", "-")
        if knob in known:
            raise InputError(f"--set {word}: {key} is set twice.")
        known.add(knob)
        space = _said(replace(space, **_fixed(word, knob, value)), word)
    for word in most:
        key, _, value = word.partition("=")
        space = _said(replace(space, **_capped(space, word, key, value)), f"max {word}")
    for word in forbid:
        space = _said(replace(space, **_forbidden(space, word)), f"no {word}")
    return space


def _of_space(space: SearchSpace) -> tuple[str, ...]:
    return () if space.name == DEFAULT else (f"space {space.name}",)


def _said(space: SearchSpace, words: str) -> SearchSpace:
    return replace(space, restrictions=(*space.restrictions, words))


def _fixed(word: str, knob: str, value: str) -> dict[str, Any]:
    """The fields that fix one knob."""
    row = SEARCHED_KNOBS.get(knob)
    if row is not None and (values := _values(row, value)):
        return {str(row.space): values}
    if knob == "checkpoint" and value in CHECKPOINTS:
        return {"levels": (CHECKPOINTS[value],)}
    if knob == "schedule" and value in set(ScheduleKind):
        return {"schedules": (ScheduleKind(value),)}
    rows = SEARCHED_KNOBS.values()
    numbers = [each.word for each in rows if not each.choices]
    choices = [f"{each.word}={', '.join(each.choices)}" for each in rows if each.choices]
    raise InputError(
        f"--set {word}: expected {', '.join(numbers)} with a number, {', '.join(choices)}, "
        f"checkpoint={', '.join(CHECKPOINTS)}, schedule={', '.join(ScheduleKind)}, "
        "or a figure of a profile (cluster.host_memory_bytes=64GB)."
    )


def _values(row: Knob, value: str) -> tuple[Any, ...]:
    """What a word says of a knob; nothing where it is none of its values."""
    if row.choices:
        return tuple(choice for choice in row.choices if choice == value)
    number = _whole(value)
    return () if number is None else (number,)


def _capped(space: SearchSpace, word: str, key: str, value: str) -> dict[str, Any]:
    """The fields that limit one knob, or the ratio of one state or of all ("offload")."""
    knob = key.replace("_", "-")
    number = _whole(value)
    if knob in COUNTED_KNOBS and number is not None and COUNTED_KNOBS[knob].means(number):
        return {"most": {**space.most, str(COUNTED_KNOBS[knob].space): number}}
    ratio = _ratio(value)
    if (knob == "offload" or knob in OFFLOADED) and ratio is not None:
        states = OFFLOADED if knob == "offload" else (knob,)
        capped = {state: _up_to(space.offload[state], ratio) for state in states}
        most = {state: min(ratio, space.most.get(state, 1.0)) for state in states}
        return {"offload": {**space.offload, **capped}, "most": {**space.most, **most}}
    raise InputError(
        f"--max {word}: expected {', '.join(COUNTED_KNOBS)} with a number, or offload, "
        f"{', '.join(OFFLOADED)} with a ratio from 0 to 1."
    )


def _whole(value: str) -> int | None:
    """A whole number from 0 up, if the word is one."""
    try:
        number = parse_whole(value)
    except ValueError:
        return None
    return number if number >= 0 else None


def _ratio(value: str) -> float | None:
    """A ratio from 0 to 1, if the word is one."""
    try:
        ratio = float(value)
    except ValueError:
        return None
    return ratio if 0 <= ratio <= 1 else None


def _up_to(ratios: tuple[float, ...], most: float) -> tuple[float, ...]:
    """The ratios up to a limit, which is one of them itself where they are not all or nothing."""
    left = tuple(ratio for ratio in ratios if ratio <= most)
    finer = len(ratios) > 2 and max(left, default=0.0) < most < max(ratios)
    return (*left, most) if finer else left


def _forbidden(space: SearchSpace, word: str) -> dict[str, Any]:
    """The fields without what one word forbids."""
    levels = {name: level for name, level in CHECKPOINTS.items() if level is not KEEPS_ALL}
    if word == "offload":
        return {"offload": NO_RATIOS}
    if word in OFFLOADED:
        return {"offload": {**space.offload, word: (0.0,)}}
    if word in levels:
        return {"levels": tuple(level for level in space.levels if level is not levels[word])}
    if word in set(ScheduleKind):
        return {"schedules": tuple(kind for kind in space.schedules if kind != word)}
    if word == "unlike-stages":
        return {"unlike_stages": False, "unequal_meshes": False}
    if word == "unequal-meshes":
        return {"unequal_meshes": False}
    known = ("offload", *OFFLOADED, *levels, *ScheduleKind, "unlike-stages", "unequal-meshes")
    raise InputError(f"--forbid {word}: expected {', '.join(known)}.")
