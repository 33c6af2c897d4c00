"""`mist plan` on toy models, without torch: what is assembled, and what is said of what fails."""

from dataclasses import replace
from pathlib import Path

import pytest
import sympy

from mist.errors import Infeasible, InputError
from mist.explain import layout_words
from mist.graph import S
from mist.planfile import dump_plan, save_plan
from mist.spaces import SearchSpace
from mist.spec import MemoryLevel, Precision
from mist.workflow.checking import check_plan
from mist.workflow.planning import make_plan
from mist.workflow.question import Question
from tests.toys import toy_graph
from tests.workflow.answering import answer_with


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is the toy of eight layers, and knows 4096 positions."""
    graph = replace(toy_graph(), notes=("made by hand",), max_seq_len=4096)
    answer_with(graph, monkeypatch)


QUESTION = Question(model="toy.py", num_gpus=8, global_batch=64)


def test_a_plan_answers_its_question() -> None:
    planned = make_plan(QUESTION, SearchSpace(), num_alternatives=3)
    plan = planned.plan
    assert plan.model.source == "toy.py"
    assert (plan.workload.seq_len, plan.workload.global_batch) == (4096, 64)
    assert plan.workload.precision is Precision.BF16
    assert (plan.cluster.name, plan.cluster.device) == ("dgx-h100", "h100-sxm")
    assert planned.notes == ("made by hand",)
    assert {*planned.seconds} == {"prepare", "search"}
    assert all(stage.peak_bytes <= planned.limits.device_bytes for stage in plan.estimate.stages)
    assert plan.provenance.gap == 0.0
    assert plan.provenance.lower_bound_s == pytest.approx(plan.estimate.step_s, rel=1e-5)
    searched = plan.provenance.search
    assert (searched["margin"], searched["restricted"]) == (0.12, "nothing")


def test_alternatives_are_slower_other_layouts_with_a_reason() -> None:
    plan = make_plan(QUESTION, SearchSpace(), num_alternatives=3).plan
    assert len(plan.alternatives) == 3
    steps = [plan.estimate.step_s, *(other.step_s for other in plan.alternatives)]
    assert steps == sorted(steps)
    words = {layout_words(plan.stages, plan.num_micro_batches)}
    words |= {other.layout for other in plan.alternatives}
    assert len(words) == 4
    assert all(other.reason for other in plan.alternatives)


def test_the_same_question_gives_the_same_bytes() -> None:
    first, second = (make_plan(QUESTION, SearchSpace()).plan for _ in range(2))
    assert dump_plan(first) == dump_plan(second)


def test_a_plan_passes_its_own_check(tmp_path: Path) -> None:
    planned = make_plan(replace(QUESTION, margin_ratio=0.5), SearchSpace())
    save_plan(planned.plan, tmp_path / "plan.yaml")
    checked = check_plan(tmp_path / "plan.yaml")
    assert checked.plan == planned.plan
    assert checked.fits
    assert checked.limits == planned.limits


def test_restrictions_are_kept_and_told() -> None:
    full = (MemoryLevel.FULL,)
    space = SearchSpace(tp=(2,), pp=(2,), levels=full, restrictions=("tp=2", "pp=2"))
    plan = make_plan(QUESTION, space).plan
    assert [(stage.tp, stage.num_full) for stage in plan.stages] == [(2, 4), (2, 4)]
    assert plan.provenance.search["restricted"] == "tp=2, pp=2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"margin_ratio": 1.0}, "--margin 1.0 is not a share of the memory (0 to 1)."),
        ({"margin_ratio": -0.1}, "--margin -0.1 is not a share of the memory (0 to 1)."),
        (
            {"seq_len": 4097},
            "--seq 4097: toy has positions for 4096 tokens. Use --seq 4096 or less.",
        ),
        ({"seq_len": 0}, "--seq 0 is not a positive number of samples or tokens."),
        ({"global_batch": 0}, "--global-batch 0 is not a positive number of samples or tokens."),
    ],
)
def test_questions_without_an_answer(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as refused:
        make_plan(replace(QUESTION, **changes), SearchSpace())  # type: ignore[arg-type]
    assert str(refused.value) == message


def test_a_batch_that_nothing_factorises() -> None:
    space = SearchSpace(pp=(1,), tp=(1,), restrictions=("pp=1", "tp=1"))
    with pytest.raises(InputError) as refused:
        make_plan(replace(QUESTION, global_batch=7), space)
    assert str(refused.value) == (
        "--global-batch 7: no (dp, micro-batch, micro-batches) factorises it on 8 GPUs with "
        "pp=1, tp=1. Try --global-batch 8."
    )


def test_a_sequence_for_which_nothing_was_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = toy_graph()
    relation = sympy.Ge(S, 4096)
    answer_with(replace(graph, head=replace(graph.head, domain=(relation,))), monkeypatch)
    with pytest.raises(InputError) as refused:
        make_plan(replace(QUESTION, seq_len=2048), SearchSpace())
    assert str(refused.value) == "--seq 2048: toy was traced for s >= 4096 only."


def test_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = toy_graph((8,), hidden=16384)
    answer_with(wide, monkeypatch)
    asked = replace(QUESTION, num_gpus=2, gpu="l4", seq_len=512)
    with pytest.raises(Infeasible) as refused:
        make_plan(asked, SearchSpace())
    message = str(refused.value)
    assert message.startswith("toy does not fit on 2 x l4. Even in the layout of least memory (pp")
    assert " GiB that a plan may use on l4 (working " in message
    # What it tells us to try fits, and half of that does not.
    num_gpus = int(message.rpartition("--gpus ")[2].rstrip("."))
    assert make_plan(replace(asked, num_gpus=num_gpus), SearchSpace()).plan.stages
    with pytest.raises(Infeasible):
        make_plan(replace(asked, num_gpus=num_gpus // 2), SearchSpace())


def test_no_number_of_gpus_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = toy_graph((8,), hidden=65536)
    answer_with(wide, monkeypatch)
    with pytest.raises(Infeasible, match=r"No doubling of the GPUs up to 4096 fits\.$"):
        make_plan(replace(QUESTION, num_gpus=1, gpu="l4", seq_len=512), SearchSpace())
