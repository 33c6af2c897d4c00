"""What is advised is done: it fits, it needs all of its changes, and the runtime can do it."""

import re
from dataclasses import replace

import pytest

from mist.errors import Infeasible, InputError
from mist.plans.breakdown import exceeded_words
from mist.plans.objectives import Objective
from mist.plans.plan import Offload
from mist.plans.search_space import SearchSpace, narrowed
from mist.units import GIB
from mist.workflow.checking import Checked, HandLayout, check_layout, offload_of
from mist.workflow.planning import Effort, make_plan
from mist.workflow.request import Question
from tests.toys import toy_graph
from tests.workflow.answering import answer_with

NOMINAL = Effort(objective=Objective.NOMINAL)  # whether there is a plan, not which is robust
QUESTION = Question(model="toy.py", num_gpus=8, seq_len=2048, global_batch=64, gpu="l4")
WIDE, WIDER = toy_graph((8,), hidden=8192), toy_graph((8,), hidden=16384)


def check(layout: HandLayout, **changes: object) -> Checked:
    return check_layout(replace(QUESTION, **changes), layout)  # type: ignore[arg-type]


def options_of(suggestion: str) -> list[tuple[str, str]]:
    """The options of a suggestion, as a user would type them."""
    words = suggestion.partition(": ")[0].split()
    return list(zip(words[::2], words[1::2], strict=True))


def followed(layout: HandLayout, options: list[tuple[str, str]]) -> HandLayout:
    """The layout with these options in place of its own."""
    for option, value in options:
        name = option.removeprefix("--").replace("-", "_")
        if name == "offload":
            ratio = offload_of([value])
            moved = {value.partition("=")[0]: getattr(ratio, value.partition("=")[0])}
            layout = replace(layout, offload=replace(layout.offload, **moved))
        else:
            new = value if name == "checkpoint" else int(value)
            layout = replace(layout, **{name: new})  # type: ignore[arg-type]
    return layout


@pytest.mark.slow
def test_where_no_single_change_helps_two_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(WIDE, monkeypatch)
    layout = HandLayout(tp=2, zero=1, micro_batch=8)
    found = check(layout)
    assert not found.fits
    assert found.suggestions[0].startswith("--zero 3 --micro-batch 4: ")
    assert len(found.suggestions) == 3
    for suggestion in found.suggestions:
        options = options_of(suggestion)
        assert len(options) == 2
        assert check(followed(layout, options)).fits
        for option in options:  # neither does it alone
            assert not check(followed(layout, [option])).fits


def test_one_change_is_enough_where_one_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(WIDE, monkeypatch)
    found = check(HandLayout(zero=1), num_gpus=16)
    assert [words.partition(":")[0] for words in found.suggestions] == ["--zero 3"]


@pytest.mark.slow
def test_weights_and_gradients_move_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch offloads a layer's weights with its gradients: half of that is no advice."""
    answer_with(WIDE, monkeypatch)
    layout = HandLayout(zero=3, micro_batch=4)
    (words,) = check(layout, num_gpus=2).suggestions
    assert words.startswith("--offload optimizer=1 --offload weights=1 --offload grads=1: ")
    changed = followed(layout, options_of(words))
    assert changed.offload == Offload(weights=1.0, grads=1.0, optimizer=1.0)
    assert check(changed, num_gpus=2).fits


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["torchtitan", "deepspeed-zero3", "megatron", "fsdp1"])
def test_advice_is_what_the_runtime_can_do(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(WIDE, monkeypatch)
    for layout in (HandLayout(), HandLayout(micro_batch=8)):
        found = check(layout, runtime=runtime, gpu="a100-sxm-40")
        for suggestion in found.suggestions:
            if suggestion.startswith("--"):
                again = check(
                    followed(layout, options_of(suggestion)), runtime=runtime, gpu="a100-sxm-40"
                )
                assert again.fits  # a rule that it breaks would have been an InputError


@pytest.mark.slow
def test_another_layout_on_these_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(WIDER, monkeypatch)
    (words,) = check(HandLayout(zero=3, micro_batch=4)).suggestions
    assert words.startswith("mist plan: it fits on 8 GPUs (pp1 dp1 tp8 zero3 ")
    assert make_plan(QUESTION, SearchSpace(), NOMINAL).plan.stages


@pytest.mark.slow
def test_the_number_of_gpus_that_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(WIDER, monkeypatch)
    asked = replace(QUESTION, seq_len=16384)
    (words,) = check_layout(replace(asked, num_gpus=2), HandLayout(zero=3)).suggestions
    found = re.fullmatch(r"mist plan --gpus (\d+): the fewest that were found to hold it", words)
    assert found is not None
    num_gpus = int(found[1])
    assert make_plan(replace(asked, num_gpus=num_gpus), SearchSpace(), NOMINAL).plan.stages
    with pytest.raises((Infeasible, InputError)):
        make_plan(replace(asked, num_gpus=num_gpus // 2), SearchSpace())


@pytest.mark.slow
def test_a_shorter_sequence_where_no_number_of_gpus_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """One stage of one rank that recomputes nothing holds one sample, however many GPUs."""
    answer_with(WIDE, monkeypatch)
    space = narrowed(SearchSpace(), fixed=["pp=1", "tp=1"], most=[], forbid=["full", "selective"])
    asked = replace(QUESTION, seq_len=65536, global_batch=4096)
    with pytest.raises(Infeasible) as refused:
        make_plan(asked, space)
    found = re.search(r"up to (\d+) fits\. Try --seq (\d+)\.", str(refused.value))
    assert found is not None
    seq_len = int(found[2])
    assert make_plan(replace(asked, seq_len=seq_len), space, NOMINAL).plan.stages
    with pytest.raises(Infeasible):
        make_plan(replace(asked, seq_len=2 * seq_len), space)
    assert str(refused.value).endswith(
        "Without what was narrowed (space plain, pp=1, tp=1, no full, no selective) it fits on 8."
    )


@pytest.mark.parametrize(
    ("peak_gib", "words"),
    [
        (
            70.0,
            "only the margin is exceeded: the card itself has 80.0 GiB usable, 10.0 GiB to spare "
            "(--margin 0.12 admits it)",
        ),
        (
            80.0,
            "only the margin is exceeded: the card itself has 80.0 GiB usable, 0 B to spare "
            "(--margin 0 admits it)",
        ),
        (94.5, "the card itself is exceeded: it has 80.0 GiB usable, 14.5 GiB too few"),
    ],
)
def test_whether_the_card_or_the_margin_is_exceeded(peak_gib: float, words: str) -> None:
    assert exceeded_words(round(peak_gib * GIB), 80 * GIB) == words


@pytest.mark.slow
def test_the_margin_that_is_named_admits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(WIDE, monkeypatch)
    layout = HandLayout(tp=2, zero=3, micro_batch=4)
    found = check(layout)
    tight = check(
        layout,
        margin_ratio=1 - 0.99 * found.peak_bytes / found.plan.estimate.stages[0].usable_bytes,
    )
    assert not tight.fits
    words = exceeded_words(tight.peak_bytes, tight.plan.estimate.stages[0].usable_bytes)
    margin = float(words.partition("--margin ")[2].split()[0])
    assert check(layout, margin_ratio=margin).fits
    assert not check(layout, margin_ratio=margin + 0.011).fits
