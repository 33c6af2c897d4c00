"""What each space may use, how the user narrows it, and the exact words of what cannot be read."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from mist.errors import InputError
from mist.plans.memory_levels import USUAL
from mist.plans.search_space import (
    ALL_OR_NOTHING,
    NO_RATIOS,
    OFFLOADED,
    PAPER_RATIOS,
    SPACES,
    SearchSpace,
    narrowed,
    space_of,
)
from mist.plans.workload import HeadMode, MemoryLevel, ScheduleKind

NONE, SELECTIVE, FULL = USUAL
TEMPO = MemoryLevel("tempo")
# Less what a mix of others, or another level, is as good as.
SEARCHED = tuple(level for level in MemoryLevel if level not in {TEMPO, "sac-half"})
GPIPE, ONE_F_ONE_B, INTERLEAVED, ZERO_BUBBLE = ScheduleKind

TABLE = {
    # name: tp, pp, ZeRO levels, memory levels, mixed in a stage, offloads, schedules, unlike stages
    "3d": (None, None, "01", (NONE, FULL), False, "", (ONE_F_ONE_B,), False),
    "megatron": (
        None, None, "01", (NONE, SELECTIVE, FULL), True, "", (ONE_F_ONE_B, INTERLEAVED), False,
    ),
    "deepspeed": (None, (1,), "0123", (NONE, FULL), False, "wgo", (ONE_F_ONE_B,), False),
    "fsdp": ((1,), (1,), "23", (NONE, SELECTIVE, FULL), False, "", (ONE_F_ONE_B,), False),
    "aceso": (None, None, "01", (NONE, FULL), True, "", (ONE_F_ONE_B,), True),
    "paper": (None, None, "0123", (NONE, SELECTIVE, FULL), True, "wgoa", (ONE_F_ONE_B,), True),
    "paper+tempo": (
        None, None, "0123", (NONE, TEMPO, SELECTIVE, FULL), True, "wgoa", (ONE_F_ONE_B,), True,
    ),
    "plain": (
        None, None, "0123", (NONE, SELECTIVE, FULL), True, "wgoa", tuple(ScheduleKind), True,
    ),
    "mist": (
        None, None, "0123", SEARCHED, True, "wgoa", tuple(ScheduleKind), True,
    ),
    "mist+heads": (
        None, None, "0123", SEARCHED, True, "wgoa", tuple(ScheduleKind), True,
    ),
    "whole": (
        None, None, "0123", (NONE, SELECTIVE, FULL), True, "wgoa", tuple(ScheduleKind), True,
    ),
}  # fmt: skip


MIST = SPACES["mist"]


def test_every_space_is_in_the_table() -> None:
    assert [*SPACES] == [*TABLE]
    assert all(space.name == name for name, space in SPACES.items())


@pytest.mark.parametrize("name", TABLE)
def test_what_a_space_may_use(name: str) -> None:
    space = space_of(name)
    away = "".join(state[0] for state in OFFLOADED if max(space.offload[state]) > 0)
    assert (
        space.tp,
        space.pp,
        "".join(map(str, space.zero)),
        space.levels,
        space.some_layers,
        away,
        space.schedules,
        space.unlike_stages,
    ) == TABLE[name]
    assert space.unequal_meshes is (name == "whole")
    assert space.head == (tuple(HeadMode) if name == "mist+heads" else (HeadMode.NONE,))
    assert (space.dp, space.micro_batch, space.most, space.restrictions) == (None, None, {}, ())


def test_an_unknown_space() -> None:
    with pytest.raises(InputError) as refused:
        space_of("4d")
    assert str(refused.value) == (
        "--space 4d is not known. Known: 3d, megatron, deepspeed, fsdp, aceso, paper, "
        "paper+tempo, plain, mist, mist+heads, whole."
    )


def test_the_ratios_of_the_paper() -> None:
    """1,984 tuples in the artifact: weights are offloaded only where gradients are."""
    tuples = itertools.product(*(PAPER_RATIOS[state] for state in ("weights", "grads")))
    pairs = sum(weights == 0 or grads > 0 for weights, grads in tuples)
    assert pairs * len(PAPER_RATIOS["optimizer"]) * len(PAPER_RATIOS["activations"]) == 1984


@pytest.mark.parametrize("ratios", [PAPER_RATIOS, NO_RATIOS, ALL_OR_NOTHING])
def test_every_state_may_stay_on_the_device(ratios: dict[str, tuple[float, ...]]) -> None:
    assert tuple(ratios) == OFFLOADED == ("weights", "grads", "optimizer", "activations")
    assert all(own[0] == 0 and list(own) == sorted(set(own)) for own in ratios.values())


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"tp": (2, 0)}, "tp 0 is not a positive number."),
        ({"pp": (-1,)}, "pp -1 is not a positive number."),
        ({"dp": (0,)}, "dp 0 is not a positive number."),
        ({"micro_batch": (0,)}, "micro_batch 0 is not a positive number."),
        ({"chunks": (2, 0)}, "chunks 0 is not a positive number."),
        ({"zero": (1, 4)}, "zero 4 is not a ZeRO level (0, 1, 2 or 3)."),
        (
            {"levels": ()},
            "no memory level is left: allow none, tempo, drop-activation, drop-norm, selective, "
            "sac-half, sdpa-only or full.",
        ),
        (
            {"offload": {"adam": (0.0,)}},
            "offload adam is none of weights, grads, optimizer, activations.",
        ),
        (
            {"offload": {**NO_RATIOS, "grads": (0.0, 1.5)}},
            "offload grads 1.5 is not a ratio from 0 to 1.",
        ),
    ],
)
def test_a_space_holds_only_what_plans_can_have(knobs: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as refused:
        SearchSpace(**knobs)  # type: ignore[arg-type]
    assert str(refused.value) == message


def test_values_that_a_space_allows() -> None:
    space = SearchSpace(tp=(1, 2, 8), most={"tp": 4, "pp": 2})
    values = np.array([1, 2, 4, 8])
    assert values[space.allows("tp", values)].tolist() == [1, 2]
    assert values[space.allows("pp", values)].tolist() == [1, 2]
    assert values[space.allows("dp", values)].tolist() == [1, 2, 4, 8]


def narrow(name: str = "mist", fixed: str = "", most: str = "", forbid: str = "") -> SearchSpace:
    """A space narrowed by words with blanks between them."""
    return narrowed(space_of(name), fixed=fixed.split(), most=most.split(), forbid=forbid.split())


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ("tp=2", {"tp": (2,)}),
        ("pp=4", {"pp": (4,)}),
        ("dp=8", {"dp": (8,)}),
        ("vpp=4", {"chunks": (4,)}),
        ("dp-replicate=2", {"dp_replicate": (2,)}),
        ("micro-batch=3", {"micro_batch": (3,)}),
        ("zero=2", {"zero": (2,)}),
        ("checkpoint=none", {"levels": (NONE,)}),
        ("head=in-forward", {"head": (HeadMode.IN_FORWARD,)}),
        ("checkpoint=selective", {"levels": (SELECTIVE,)}),
        ("checkpoint=full", {"levels": (FULL,)}),
        ("schedule=zero-bubble", {"schedules": (ZERO_BUBBLE,)}),
        ("schedule=1f1b", {"schedules": (ONE_F_ONE_B,)}),
        ("tp=2 zero=1", {"tp": (2,), "zero": (1,)}),
    ],
)
def test_what_is_set(words: str, changed: dict[str, object]) -> None:
    assert narrow(fixed=words) == replace(MIST, restrictions=tuple(words.split()), **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "most"),
    [
        ("tp=4", {"tp": 4}),
        ("pp=2 micro-batch=8", {"pp": 2, "micro_batch": 8}),
        ("dp=1", {"dp": 1}),
        ("vpp=4", {"chunks": 4}),
    ],
)
def test_what_is_limited(words: str, most: dict[str, int]) -> None:
    told = tuple(f"max {word}" for word in words.split())
    assert narrow(most=words) == replace(MIST, most=most, restrictions=told)


COARSE = (0.0, 0.25, 0.375, 0.5, 0.75, 1.0)


@pytest.mark.parametrize(
    ("words", "ratios", "most"),
    [
        (
            "offload=0.5",
            {
                "weights": COARSE[:4],
                "grads": COARSE[:4],
                "optimizer": COARSE[:4],
                "activations": COARSE[:4],
            },
            dict.fromkeys(OFFLOADED, 0.5),
        ),
        ("optimizer=0.3", {"optimizer": (0.0, 0.25, 0.3)}, {"optimizer": 0.3}),
        ("activations=1", {}, {"activations": 1.0}),
        ("offload=0", dict.fromkeys(OFFLOADED, (0.0,)), dict.fromkeys(OFFLOADED, 0.0)),
        (
            "offload=0.75 grads=.25",
            {
                "weights": COARSE[:5],
                "grads": COARSE[:2],
                "optimizer": (0.0, 0.25, 0.375, 0.5, 0.625, 0.75),
                "activations": (0.0, 0.25, 0.375, 0.5, 0.625, 0.75),
            },
            {**dict.fromkeys(OFFLOADED, 0.75), "grads": 0.25},
        ),
    ],
)
def test_ratios_that_are_limited(
    words: str, ratios: dict[str, tuple[float, ...]], most: dict[str, float]
) -> None:
    told = tuple(f"max {word}" for word in words.split())
    offload = {**PAPER_RATIOS, **ratios}
    assert narrow(most=words) == replace(MIST, offload=offload, most=most, restrictions=told)


def test_all_or_nothing_below_a_limit_is_nothing() -> None:
    assert narrow("deepspeed", most="offload=0.5").offload == NO_RATIOS


@pytest.mark.parametrize(
    ("word", "changed"),
    [
        ("offload", {"offload": NO_RATIOS}),
        ("weights", {"offload": {**PAPER_RATIOS, "weights": (0.0,)}}),
        ("activations", {"offload": {**PAPER_RATIOS, "activations": (0.0,)}}),
        ("selective", {"levels": tuple(level for level in SEARCHED if level is not SELECTIVE)}),
        ("full", {"levels": tuple(level for level in SEARCHED if level is not FULL)}),
        ("interleaved", {"schedules": (GPIPE, ONE_F_ONE_B, ZERO_BUBBLE)}),
        ("1f1b", {"schedules": (GPIPE, INTERLEAVED, ZERO_BUBBLE)}),
        ("unlike-stages", {"unlike_stages": False, "unequal_meshes": False}),
        ("unequal-meshes", {"unequal_meshes": False}),
    ],
)
def test_what_is_forbidden(word: str, changed: dict[str, object]) -> None:
    assert narrow(forbid=word) == replace(MIST, restrictions=(f"no {word}",), **changed)  # type: ignore[arg-type]


def test_restrictions_are_told_in_order() -> None:
    space = narrow("megatron", "zero=1 tp=2", "pp=4", "selective interleaved")
    assert space.name == "megatron"
    assert space.restrictions == (
        "space megatron", "zero=1", "tp=2", "max pp=4", "no selective", "no interleaved",
    )  # fmt: skip
    assert (space.levels, space.schedules) == ((NONE, FULL), (ONE_F_ONE_B,))
    assert narrow("plain") == replace(SearchSpace(), restrictions=("space plain",))


EXPECTED_SET = (
    "expected tp, pp, dp, dp-replicate, micro-batch, vpp, zero with a number, head=none, "
    "checkpointed, in-forward, checkpoint=none, tempo, drop-activation, "
    "drop-norm, selective, sac-half, sdpa-only, full, "
    "schedule=gpipe, 1f1b, interleaved, zero-bubble, or a figure of a profile "
    "(cluster.host_memory_bytes=64GB)."
)
EXPECTED_MAX = (
    "expected tp, pp, dp, dp-replicate, micro-batch, vpp with a number, or offload, weights, "
    "grads, optimizer, activations with a ratio from 0 to 1."
)
EXPECTED_FORBID = (
    "expected offload, weights, grads, optimizer, activations, tempo, drop-activation, "
    "drop-norm, selective, sac-half, sdpa-only, full, gpipe, 1f1b, "
    "interleaved, zero-bubble, unlike-stages, unequal-meshes."
)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"fixed": "colour=2"}, f"--set colour=2: {EXPECTED_SET}"),
        ({"fixed": "tp"}, f"--set tp: {EXPECTED_SET}"),
        ({"fixed": "tp=two"}, f"--set tp=two: {EXPECTED_SET}"),
        ({"fixed": "zero=-1"}, f"--set zero=-1: {EXPECTED_SET}"),
        ({"fixed": "checkpoint=some"}, f"--set checkpoint=some: {EXPECTED_SET}"),
        ({"fixed": "schedule=dapple"}, f"--set schedule=dapple: {EXPECTED_SET}"),
        ({"fixed": "tp=2 tp=4"}, "--set tp=4: tp is set twice."),
        ({"fixed": "tp=0"}, "tp 0 is not a positive number."),
        ({"fixed": "zero=7"}, "zero 7 is not a ZeRO level (0, 1, 2 or 3)."),
        ({"most": "tp"}, f"--max tp: {EXPECTED_MAX}"),
        ({"most": "pp=0"}, f"--max pp=0: {EXPECTED_MAX}"),
        ({"most": "zero=2"}, f"--max zero=2: {EXPECTED_MAX}"),
        ({"most": "offload=2"}, f"--max offload=2: {EXPECTED_MAX}"),
        ({"most": "optimizer=nan"}, f"--max optimizer=nan: {EXPECTED_MAX}"),
        ({"most": "vpp=0.5"}, f"--max vpp=0.5: {EXPECTED_MAX}"),
        ({"fixed": "vpp=0"}, "chunks 0 is not a positive number."),
        ({"fixed": "dp-replicate=0"}, "dp_replicate 0 is not a positive number."),
        ({"fixed": "offload=0.5"}, f"--set offload=0.5: {EXPECTED_SET}"),
        ({"forbid": "none"}, f"--forbid none: {EXPECTED_FORBID}"),
        ({"forbid": "tp"}, f"--forbid tp: {EXPECTED_FORBID}"),
        (
            {"fixed": "checkpoint=full", "forbid": "full"},
            "no memory level is left: allow none, tempo, drop-activation, drop-norm, selective, "
            "sac-half, sdpa-only or full.",
        ),
    ],
)
def test_words_that_cannot_be_read(words: dict[str, str], message: str) -> None:
    with pytest.raises(InputError) as refused:
        narrow(**words)
    assert str(refused.value) == message
