"""`mist check` on toy models, without torch: verdicts, faults, notes, suggestions."""

from dataclasses import replace
from pathlib import Path

import pytest

from mist.errors import InputError, PlanError
from mist.planfile import load_plan, save_plan
from mist.plans import Limits, Offload, Plan, Schedule
from mist.spec import MemoryLevel, ScheduleKind
from mist.workflow.checking import Checked, HandLayout, check_layout, check_plan, offload_of
from mist.workflow.question import Question
from tests.toys import toy_graph
from tests.workflow.answering import answer_with

LAYOUT = HandLayout(tp=2, pp=2, zero=1, micro_batch=1, checkpoint="3")


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is the toy of eight layers."""
    graph = replace(toy_graph(), notes=("made by hand",))
    answer_with(graph, monkeypatch)


def ask(**changes: object) -> Question:
    return replace(Question(model="toy.py", num_gpus=8, seq_len=2048), **changes)  # type: ignore[arg-type]


def check(layout: HandLayout = LAYOUT, **changes: object) -> Checked:
    return check_layout(ask(**changes), layout)


def test_a_layout_becomes_equal_stages() -> None:
    plan = check().plan
    assert [stage.layers for stage in plan.stages] == [((0, 4),), ((4, 4),)]
    assert [stage.devices for stage in plan.stages] == [(0, 4), (4, 4)]
    assert {(s.dp, s.tp, s.sp, s.zero, s.num_full) for s in plan.stages} == {(2, 2, True, 1, 3)}
    assert plan.num_micro_batches == 256 // 2
    assert plan.provenance.solver == "none: written by hand"


def test_the_first_stages_are_longer_where_layers_do_not_divide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer_with(toy_graph((6,)), monkeypatch)
    plan = check(HandLayout(pp=4)).plan
    assert [stage.layers[0] for stage in plan.stages] == [(0, 2), (2, 2), (4, 1), (5, 1)]


@pytest.mark.parametrize(("checkpoint", "num_full"), [("none", 0), ("full", 4), ("9", 4), ("2", 2)])
def test_checkpointed_layers(checkpoint: str, num_full: int) -> None:
    stages = check(replace(LAYOUT, checkpoint=checkpoint)).plan.stages
    assert [stage.num_full for stage in stages] == [num_full, num_full]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tp": 0}, "--tp 0 is not a positive number."),
        ({"micro_batch": -1}, "--micro-batch -1 is not a positive number."),
        ({"zero": 4}, "--zero 4 is not a ZeRO level (0, 1, 2 or 3)."),
        (
            {"checkpoint": "some"},
            "--checkpoint some is neither none, selective, full nor a number of layers.",
        ),
        (
            {"checkpoint": "\N{SUPERSCRIPT TWO}"},
            "--checkpoint \N{SUPERSCRIPT TWO} is neither none, selective, full nor a number of "
            "layers.",
        ),
    ],
)
def test_layouts_that_mean_nothing(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as refused:
        HandLayout(**values)  # type: ignore[arg-type]
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            HandLayout(tp=3),
            "--tp 3 * --pp 1 = 3 does not divide the 8 GPUs.\n"
            "tp 3 does not divide the 8 GPUs per node of dgx-h100.\n"
            "tp 3 does not divide the 4096 MLP width of toy.\n"
            "tp 3 does not divide the sequence of 2048 tokens, which runtime torch shards with it.",
        ),
        (
            HandLayout(micro_batch=3),
            "dp 8 * micro-batch 3 * 10 micro-batches is not the global batch of 256.",
        ),
    ],
)
def test_layouts_that_break_rules(layout: HandLayout, message: str) -> None:
    with pytest.raises(InputError) as refused:
        check(layout)
    assert str(refused.value) == message


def test_the_margin_decides_what_fits() -> None:
    loose = check(margin_ratio=0.0)
    share = 1 - loose.peak_bytes / loose.limits.device_bytes
    assert check(margin_ratio=share - 1e-6).fits
    tight = check(margin_ratio=share + 1e-6)
    assert not tight.fits
    assert tight.margin_bytes == tight.limits.device_bytes - tight.peak_bytes < 0


def test_suggestions_fit_and_say_what_they_bring() -> None:
    layout = HandLayout(micro_batch=32)
    margin = (
        1 - 0.9 * check(layout).peak_bytes / check(layout, margin_ratio=0.0).limits.device_bytes
    )
    tight = check(layout, margin_ratio=margin)
    assert not tight.fits
    assert 1 <= len(tight.suggestions) <= 3
    assert "--micro-batch 16: " in " ".join(tight.suggestions)
    again = check(replace(layout, micro_batch=16), margin_ratio=margin)
    assert again.fits


def test_suggestions_for_what_fits_are_faster() -> None:
    found = check(HandLayout(micro_batch=2, checkpoint="full"))
    assert found.fits
    words = next(words for words in found.suggestions if words.startswith("--checkpoint none: "))
    faster = check(HandLayout(micro_batch=2, checkpoint="none"))
    assert faster.plan.estimate.step_s < found.plan.estimate.step_s
    assert " per step, peak " in words


def saved(tmp_path: Path, plan: Plan | None = None) -> Path:
    path = tmp_path / "plan.yaml"
    save_plan(plan or check().plan, path)
    return path


def test_a_plan_is_judged_as_its_layout_was(tmp_path: Path) -> None:
    first, again = check(), check_plan(saved(tmp_path))
    assert again.plan == first.plan
    assert again.limits == first.limits
    assert again.notes == first.notes == ("made by hand",)


def test_a_plan_keeps_its_margin_unless_another_is_given(tmp_path: Path) -> None:
    path = saved(tmp_path, check(margin_ratio=0.3).plan)
    assert check_plan(path).limits == check(margin_ratio=0.3).limits
    assert check_plan(path, margin_ratio=0.1).limits == check(margin_ratio=0.1).limits


def test_a_stale_estimate_is_replaced(tmp_path: Path) -> None:
    plan = check().plan
    stale = replace(plan, estimate=replace(plan.estimate, step_s=1e-3))
    assert check_plan(saved(tmp_path, stale)).plan == plan


def test_a_changed_profile_is_noted(tmp_path: Path) -> None:
    plan = check().plan
    profiles = plan.provenance.profiles | {"torch": "sha256:0"}
    old = replace(plan, provenance=replace(plan.provenance, profiles=profiles))
    assert check_plan(saved(tmp_path, old)).notes == (
        "made by hand",
        "profile torch has changed since the plan was made: the figures are new",
    )


def test_a_plan_for_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path)
    other = replace(toy_graph((9,)), name="other", fingerprint="sha256:other", num_params=7)
    answer_with(other, monkeypatch)
    with pytest.raises(PlanError) as refused:
        check_plan(path)
    num_params = load_plan(path).model.params
    assert str(refused.value) == (
        f"{path} has 2 faults:\n"
        "  model.fingerprint: the plan is for another model: it was made for toy with "
        f"{num_params} parameters, toy.py is now other with 7\n"
        "  stages: the stages cover 8 layers, other has 9"
    )


def test_parameters_that_are_not_the_models(tmp_path: Path) -> None:
    plan = check().plan
    path = saved(tmp_path, replace(plan, model=replace(plan.model, params=7)))
    with pytest.raises(PlanError) as refused:
        check_plan(path)
    assert str(refused.value) == (
        f"{path} has 1 fault:\n  model.params: 7, but toy has {plan.model.params}"
    )


def test_a_plan_names_its_cluster(tmp_path: Path) -> None:
    plan = check().plan
    path = saved(tmp_path, replace(plan, cluster=replace(plan.cluster, name="")))
    with pytest.raises(InputError) as refused:
        check_plan(path)
    assert str(refused.value) == (
        "--cluster '' is no name. Leave it out for the device's own cluster."
    )


def test_what_a_prediction_would_pass_over_is_a_fault(tmp_path: Path) -> None:
    plan = check().plan
    first, second = plan.stages
    odd = replace(
        plan,
        cluster=replace(plan.cluster, gpus_per_node=4),
        workload=replace(plan.workload, compile=True),
        stages=(
            replace(first, sp=False, offload=Offload(weights=0.5)),
            replace(second, tp=1, cp=2, ep=2, sp=False),
        ),
    )
    path = saved(tmp_path, odd)
    with pytest.raises(PlanError) as refused:
        check_plan(path)
    assert str(refused.value) == (
        f"{path} has 7 faults:\n"
        "  cluster.gpus_per_node: 4, but 8 GPUs of dgx-h100 are 8 per node\n"
        "  workload.compile: compiled models are not predicted\n"
        "  stages[0].sp: runtime torch with tp 2 is predicted with sp true only\n"
        "  stages[0]: offloading weights needs ZeRO-2 or more under runtime torch, found ratio "
        "0.5 at ZeRO-1.\n"
        "  stages[0]: runtime torch offloads weights and gradients of a layer together: their "
        "ratios are 0.5 and 0.\n"
        "  stages[1].cp: only 1 is predicted\n"
        "  stages[1].ep: only 1 is predicted"
    )


def test_a_plan_that_breaks_a_rule_is_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path)
    graph = toy_graph()
    limit = replace((graph.tp_limits or ())[0], size=3)
    answer_with(replace(graph, tp_limits=(limit,)), monkeypatch)
    with pytest.raises(PlanError) as refused:
        check_plan(path)
    message = "tp 2 does not divide the 3 MLP width of toy."
    assert [str(fault) for fault in refused.value.faults] == [
        f"stages[0]: {message}",
        f"stages[1]: {message}",
    ]


def test_a_plan_of_a_module_names_no_file(tmp_path: Path) -> None:
    plan = check().plan
    path = saved(tmp_path, replace(plan, model=replace(plan.model, source="object:toy")))
    with pytest.raises(InputError) as refused:
        check_plan(path)
    assert str(refused.value) == (
        f"{path} was planned from a module in Python, which no file names. "
        "Set model.source to a file with build_model()."
    )


def test_the_model_is_looked_for_beside_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path)
    asked = answer_with(toy_graph(), monkeypatch)
    check_plan(path)
    (tmp_path / "toy.py").write_text("")
    check_plan(path)
    assert asked == ["toy.py", str(tmp_path / "toy.py")]


def test_an_empty_cluster_name_is_refused() -> None:
    with pytest.raises(InputError, match="--cluster '' is no name"):
        Question(model="toy", num_gpus=8, cluster="")


def test_a_superscript_is_no_number_of_layers() -> None:
    with pytest.raises(InputError, match="is neither none, selective, full nor a number of layers"):
        HandLayout(checkpoint="\u00b2")


def test_a_layout_with_chunks_levels_and_offloads(tmp_path: Path) -> None:
    layout = HandLayout(
        pp=2, vpp=2, schedule=ScheduleKind.INTERLEAVED, zero=2, checkpoint="selective",
        offload=offload_of(["optimizer=0.5", "activations=0.25"]),
    )  # fmt: skip
    checked = check(layout)
    plan = checked.plan
    assert plan.schedule == Schedule(kind=ScheduleKind.INTERLEAVED, vpp=2)
    assert [stage.layers for stage in plan.stages] == [((0, 2), (4, 2)), ((2, 2), (6, 2))]
    assert all(stage.num_at(MemoryLevel.SELECTIVE) == 4 for stage in plan.stages)
    assert all(stage.host_bytes > 0 for stage in plan.estimate.stages)
    assert check_plan(saved(tmp_path, plan)).plan == plan


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"vpp": 2},
            "--schedule 1f1b with --vpp 2: interleaved takes 2 or more chunks per stage, "
            "the others 1.",
        ),
        (
            {"schedule": ScheduleKind.INTERLEAVED},
            "--schedule interleaved with --vpp 1: interleaved takes 2 or more chunks per stage, "
            "the others 1.",
        ),
    ],
)
def test_chunks_that_do_not_go_with_the_schedule(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as refused:
        HandLayout(**values)  # type: ignore[arg-type]
    assert str(refused.value) == message


@pytest.mark.parametrize("word", ["cache=0.5", "optimizer=2", "optimizer=half", "optimizer"])
def test_offloads_that_are_none(word: str) -> None:
    with pytest.raises(InputError) as refused:
        offload_of([word])
    assert str(refused.value) == (
        f"--offload {word}: expected weights, grads, optimizer, activations "
        "with a ratio from 0 to 1."
    )


def test_host_memory_decides_too() -> None:
    """Eight ranks of a node share it: what one may hold is an eighth, less the margin."""
    layout = HandLayout(zero=0, offload=offload_of(["optimizer=1"]))
    checked = check(layout)
    held = checked.plan.estimate.stages[0].host_bytes
    params = toy_graph().num_params
    assert held == pytest.approx(8 * params, rel=1e-6)
    assert checked.fits
    tight = Limits(device_bytes=checked.limits.device_bytes, host_bytes=held - 1)
    assert not replace(checked, limits=tight).fits
