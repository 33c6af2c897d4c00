"""`mist plan` on toy models, without torch: what is assembled, and what is said of what fails."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import sympy

from mist.errors import Infeasible, InputError
from mist.milp import Method
from mist.model.graph import S
from mist.plans.breakdown import layout_words
from mist.plans.file import dump_plan, save_plan
from mist.plans.objectives import Objective
from mist.plans.search_space import NO_RATIOS, SearchSpace, space_of
from mist.plans.workload import MemoryLevel, Precision, ScheduleKind
from mist.platform.overrides import HOST_MEMORY
from mist.units import GB, GIB
from mist.workflow.checking import check_plan
from mist.workflow.planning import Effort, Planned, make_plan
from mist.workflow.request import Question
from tests.fast_cases import first_fast
from tests.toys import toy_graph
from tests.workflow.answering import answer_with


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is the toy of eight layers, and knows 4096 positions."""
    graph = replace(toy_graph(), notes=("made by hand",), max_seq_len=4096)
    answer_with(graph, monkeypatch)


SMALL = SearchSpace(pp=(2,), tp=(1, 2), offload=NO_RATIOS, schedules=(ScheduleKind.ONE_F_ONE_B,))
QUESTION = Question(model="toy.py", num_gpus=8, global_batch=64)
NOMINAL = Effort(objective=Objective.NOMINAL)


@cache
def made() -> Planned:
    """What several tests look at."""
    return make_plan(QUESTION, SearchSpace(), Effort(num_alternatives=3))


def test_a_plan_answers_its_question() -> None:
    planned = made()
    plan = planned.plan
    assert plan.model.source == "toy.py"
    assert (plan.workload.seq_len, plan.workload.global_batch) == (4096, 64)
    assert plan.workload.precision is Precision.BF16
    assert (plan.cluster.name, plan.cluster.device) == ("dgx-h100", "h100-sxm")
    assert planned.notes[-1] == "made by hand"
    assert {*planned.seconds} == {"prepare", "search"}
    assert all(stage.peak_bytes <= planned.limits.device_bytes for stage in plan.estimate.stages)
    assert plan.provenance.gap == 0.0
    assert plan.provenance.lower_bound_s == pytest.approx(plan.estimate.step_s, rel=1e-5)
    searched = plan.provenance.search
    assert (searched["margin"], searched["restricted"]) == (0.142, "nothing")


def test_alternatives_are_slower_other_layouts_with_a_reason() -> None:
    plan = made().plan
    assert len(plan.alternatives) == 3
    steps = [plan.estimate.step_s, *(other.step_s for other in plan.alternatives)]
    assert steps == sorted(steps)
    words = {layout_words(plan.layout)}
    words |= {other.layout for other in plan.alternatives}
    assert len(words) == 4
    assert all(other.reason for other in plan.alternatives)


@pytest.mark.slow
def test_the_same_question_gives_the_same_bytes() -> None:
    again = make_plan(QUESTION, SearchSpace(), Effort(num_alternatives=3))
    assert dump_plan(again.plan) == dump_plan(made().plan)


@pytest.mark.slow
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
    plan = make_plan(QUESTION, space, NOMINAL).plan
    assert [(stage.tp, stage.num_full) for stage in plan.stages] == [(2, 4), (2, 4)]
    assert plan.provenance.search["restricted"] == "tp=2, pp=2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"margin_ratio": 1.0}, "--margin 1.0 is not a share of the memory (0 to 1)."),
        ({"margin_ratio": -0.1}, "--margin -0.1 is not a share of the memory (0 to 1)."),
        (
            {"seq_len": 4097},
            "--seq 4097: toy has positions for 4096 tokens. Use --seq 4096 or less, or a model "
            "with more: max_position_embeddings of a config.json can be raised.",
        ),
        ({"seq_len": 0}, "--seq 0 is not a positive number of samples or tokens."),
        ({"global_batch": 0}, "--global-batch 0 is not a positive number of samples or tokens."),
        (
            {"global_batch": 10**20 - 1},
            "--global-batch 99999999999999999999 is more than Mist plans for. Use at most "
            "4294967296.",
        ),
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


@pytest.mark.slow
def test_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = toy_graph((8,), hidden=16384)
    answer_with(wide, monkeypatch)
    asked = replace(QUESTION, num_gpus=2, gpu="l4", seq_len=16384)
    space = SearchSpace(micro_batch=(1,), schedules=(ScheduleKind.ONE_F_ONE_B,))
    with pytest.raises(Infeasible) as refused:
        make_plan(asked, space)
    message = str(refused.value)
    assert message.startswith("toy does not fit on 2 x l4. Even in the layout of least memory (pp")
    assert " GiB that a plan may use on l4 (working " in message
    # What it tells us to try fits, and half of that does not.
    num_gpus = int(message.rpartition("--gpus ")[2].rstrip("."))
    assert make_plan(replace(asked, num_gpus=num_gpus), space, NOMINAL).plan.stages
    with pytest.raises(Infeasible):
        make_plan(replace(asked, num_gpus=num_gpus // 2), space)


@pytest.mark.slow
def test_host_memory_is_a_limit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """26e9 parameters of 16 bytes: two L4s and their share of the host hold too little.

    What is told is over the limit, though with all of it in host memory the devices would do.
    """
    answer_with(toy_graph((48,), hidden=8192), monkeypatch)
    asked = replace(QUESTION, num_gpus=2, gpu="l4", seq_len=512)
    with pytest.raises(Infeasible) as refused:
        make_plan(asked, SearchSpace())
    message = str(refused.value)
    found = re.search(r"needs ([\d.]+) GiB of the ([\d.]+) GiB that a plan may use on l4", message)
    assert found is not None
    assert float(found[1]) > float(found[2])
    # Of each node's 384 GB, 86 % in eight shares; and 18.0 GiB of each device, of which the
    # allocator and what a layer works with take 9.9 (the words above).
    needed = 16 * toy_graph((48,), hidden=8192).num_params
    held = 0.86 * 384e9 / 8 + (18.0 - 9.9) * GIB
    assert needed > 8 * held
    assert needed < 16 * held
    assert message.endswith(" Try --gpus 16.")
    assert message.startswith("toy does not fit on 2 x l4. With offload it would need ")
    assert (
        " GiB of the 306.8 GiB of host memory per node that a plan may use (86% of 357.6 GiB, "
        "spec: Google Cloud g2-standard-96: 384 GB). Try --host-memory " in message
    )


@pytest.mark.slow
def test_the_host_memory_to_try_is_enough_and_a_tenth_less_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer_with(toy_graph((16,), hidden=8192), monkeypatch)
    asked = replace(QUESTION, num_gpus=2, gpu="l4", seq_len=512, overrides={HOST_MEMORY: 96 * GB})
    space = SearchSpace(pp=(1,), tp=(1,))
    with pytest.raises(Infeasible) as refused:
        make_plan(asked, space)
    found = re.search(r"Try --host-memory (\d+)GB\.", str(refused.value))
    assert found is not None
    num_bytes = int(found[1]) * GB
    planned = make_plan(replace(asked, overrides={HOST_MEMORY: num_bytes}), space)
    assert planned.host.fits
    assert planned.plan.overrides[HOST_MEMORY] == num_bytes
    with pytest.raises(Infeasible):
        make_plan(replace(asked, overrides={HOST_MEMORY: round(0.9 * num_bytes)}), space)


def test_what_is_offloaded_leaves_room_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that holds what the best plan offloads, but not what each rank draws beside it.

    Drawn is the largest module of the toy, four times hidden squared, in fp32.
    """
    answer_with(toy_graph((3,), hidden=8192), monkeypatch)
    asked = replace(QUESTION, num_gpus=2, gpu="l4", seq_len=4096, margin_ratio=0.0)
    space = SearchSpace(
        pp=(1,), tp=(1,), offload={**NO_RATIOS, "optimizer": (0.0, 0.25, 0.5, 0.75, 1.0)}
    )
    ample = make_plan(asked, space, NOMINAL).host
    assert ample.held_bytes > 0
    assert ample.loading_bytes == ample.held_bytes + 2 * ample.drawn_bytes
    tighter = replace(asked, overrides={HOST_MEMORY: ample.loading_bytes - 1})
    tight = make_plan(tighter, space, NOMINAL).host
    assert tight.fits
    assert tight.held_bytes < ample.held_bytes
    with pytest.raises(Infeasible) as refused:
        make_plan(replace(asked, overrides={HOST_MEMORY: 2 * ample.drawn_bytes - 1}), space)
    assert "toy does not fit on 2 x l4. It cannot be loaded in host memory: it needs " in str(
        refused.value
    )


@pytest.mark.parametrize(
    ("method", "solver"),
    first_fast(
        [
            ("both", "dynamic program, confirmed by HiGHS through PuLP"),
            ("dp", "dynamic program"),
            ("milp", "HiGHS through PuLP"),
        ],
        width=2,
    ),
)
def test_every_solver_finds_the_same_plan_and_is_named(method: Method, solver: str) -> None:
    known = make_plan(QUESTION, SMALL, NOMINAL).plan
    plan = make_plan(QUESTION, SMALL, replace(NOMINAL, method=method)).plan
    assert plan.provenance.solver == solver
    assert plan.stages == known.stages
    assert plan.estimate == known.estimate


@pytest.mark.slow
def test_like_stages_need_no_solver() -> None:
    planned = make_plan(QUESTION, space_of("3d"), NOMINAL)
    solver = planned.plan.provenance.solver
    assert solver == "none: every layout of like stages was judged"
    assert (
        len({(s.tp, s.dp, s.zero, s.micro_batch, s.num_layers) for s in planned.plan.stages}) == 1
    )


def test_no_time_gives_a_plan_and_its_gap() -> None:
    whole = made().plan
    cut = make_plan(QUESTION, SearchSpace(), Effort(time_limit_s=0.0)).plan
    assert cut.provenance.search["groups_left"] > 0  # type: ignore[operator]
    assert cut.provenance.lower_bound_s <= whole.estimate.step_s <= cut.estimate.step_s
    gap = 1 - cut.provenance.lower_bound_s / cut.estimate.step_s
    assert cut.provenance.gap == pytest.approx(gap, rel=0.01)


@pytest.mark.slow
def test_no_number_of_gpus_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = toy_graph((8,), hidden=65536)
    answer_with(wide, monkeypatch)
    with pytest.raises(Infeasible, match=r"No doubling of the GPUs up to 4096 fits\.$"):
        make_plan(replace(QUESTION, num_gpus=64, gpu="l4", seq_len=512), SearchSpace())
