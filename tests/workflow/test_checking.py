"""`mist check` on toy models, without torch: verdicts, faults, notes, suggestions."""

from dataclasses import replace
from pathlib import Path

import pytest

from mist.errors import InputError, PlanError
from mist.plans.file import load_plan, save_plan
from mist.plans.memory_levels import USUAL
from mist.plans.plan import Offload, Plan, Schedule
from mist.plans.workload import Attention, Precision, ScheduleKind
from mist.platform.overrides import HOST_MEMORY
from mist.platform.profiles import Family, list_profiles, load_cluster, load_device
from mist.units import format_seconds
from mist.workflow.checking import Checked, HandLayout, check_layout, check_plan, offload_of
from mist.workflow.plan_model import TRUSTED
from mist.workflow.request import Question
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


@pytest.mark.slow
def test_the_first_stages_are_longer_where_layers_do_not_divide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer_with(toy_graph((6,)), monkeypatch)
    plan = check(HandLayout(pp=4)).plan
    assert [stage.layers[0] for stage in plan.stages] == [(0, 2), (2, 2), (4, 1), (5, 1)]


@pytest.mark.parametrize(
    ("checkpoint", "counts"),
    [
        ("selective", (0, 4, 0)),
        ("2", (2, 0, 2)),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("none", (4, 0, 0)), ("full", (0, 0, 4)), ("9", (0, 0, 4)))
        ),
    ],
)
def test_checkpointed_layers(checkpoint: str, counts: tuple[int, int, int]) -> None:
    stages = check(replace(LAYOUT, checkpoint=checkpoint)).plan.stages
    assert [tuple(map(stage.num_at, USUAL)) for stage in stages] == [counts, counts]


@pytest.mark.slow
def test_chunks_are_dealt_out_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten layers in four chunks: 3, 3, 2, 2, each stage with every second one."""
    answer_with(toy_graph((10,)), monkeypatch)
    plan = check(HandLayout(pp=2, schedule=ScheduleKind.INTERLEAVED, vpp=2)).plan
    assert plan.schedule == Schedule(kind=ScheduleKind.INTERLEAVED, vpp=2)
    assert [stage.layers for stage in plan.stages] == [((0, 3), (6, 2)), ((3, 3), (8, 2))]


@pytest.mark.slow
def test_copies_of_the_states() -> None:
    """ZeRO-3 holds 16 bytes per parameter over the ranks of a copy: 8 ranks, 2 copies, 4 each."""
    found = check(HandLayout(zero=3, dp_replicate=2))
    (stage,) = found.plan.stages
    assert (stage.dp, stage.dp_replicate, stage.dp_shard) == (8, 2, 4)
    states = found.plan.estimate.stages[0].memory_parts_bytes["states"]
    assert states == pytest.approx(16 * toy_graph().num_params / 4, abs=1)


@pytest.mark.slow
def test_copies_are_suggested_where_nodes_are_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(toy_graph((8,), hidden=8192), monkeypatch)
    copies = check(HandLayout(zero=3, dp_replicate=2), num_gpus=16, margin_ratio=0.0)
    margin = 1 - 1.01 * copies.peak_bytes / copies.limits.device_bytes  # of little else
    found = check(HandLayout(zero=3), num_gpus=16, margin_ratio=margin)
    assert "--dp-replicate 2: " in " ".join(found.suggestions)


def test_what_is_offloaded_is_held_by_the_host() -> None:
    """Torch keeps 8 bytes per parameter of the optimizer, divided among dp ranks under ZeRO-1.

    Two moments, half of them in host memory, which are as large there as they are.
    """
    kept = check(HandLayout(zero=1, micro_batch=4))
    away = check(HandLayout(zero=1, micro_batch=4, offload=Offload(optimizer=0.5)))
    moved = 8 * toy_graph().num_params / 8 / 2
    (there,), (here,) = away.plan.estimate.stages, kept.plan.estimate.stages
    assert here.host_bytes == 0
    assert there.host_bytes == moved
    states = here.memory_parts_bytes["states"] - there.memory_parts_bytes["states"]
    assert states == pytest.approx(moved, abs=1)


@pytest.mark.slow
def test_host_memory_must_hold_it_too() -> None:
    layout = HandLayout(zero=1, offload=Offload(optimizer=1.0))
    found = check(layout)
    assert found.fits
    # Both moments, 8 bytes of each parameter over 8 ranks; and the part that each draws, in fp32.
    drawn = 4 * 32000 * 1024
    needed = 8 * toy_graph().num_params + drawn
    assert found.host.loading_bytes == needed
    assert found.host.held_bytes == needed - drawn
    for room, fits in ((found.host.loading_bytes, True), (found.host.loading_bytes - 1, False)):
        judged = check(layout, overrides={HOST_MEMORY: room}, margin_ratio=0.0)
        assert (judged.fits, judged.margin_bytes > 0) == (fits, True)
        words = f"--host-memory {1 + found.host.loading_bytes // 10**9}GB, if the nodes have it"
        assert (words in judged.suggestions) is not fits


@pytest.mark.parametrize(
    ("words", "offload"),
    [
        ((), Offload()),
        (("optimizer=0.5", "activations=1"), Offload(optimizer=0.5, activations=1.0)),
        (("weights=0.25", "grads=.25"), Offload(weights=0.25, grads=0.25)),
    ],
)
def test_words_of_offloading(words: tuple[str, ...], offload: Offload) -> None:
    assert offload_of(words) == offload


@pytest.mark.parametrize("word", ["optimizer", "optimizer=", "adam=1", "grads=1.5", "grads=nan"])
def test_words_that_offload_nothing(word: str) -> None:
    with pytest.raises(InputError) as refused:
        offload_of([word])
    assert str(refused.value) == (
        f"--offload {word}: expected weights, grads, optimizer, activations "
        "with a ratio from 0 to 1."
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tp": 0}, "--tp 0 is not a positive number."),
        ({"micro_batch": -1}, "--micro-batch -1 is not a positive number."),
        ({"dp_replicate": 0}, "--dp-replicate 0 is not a positive number."),
        ({"zero": 4}, "--zero 4 is not a ZeRO level (0, 1, 2 or 3)."),
        (
            {"checkpoint": "some"},
            "--checkpoint some is neither none, tempo, drop-activation, "
            "drop-norm, selective, sac-half, sdpa-only, full nor a number of layers.",
        ),
        (
            {"checkpoint": "\N{SUPERSCRIPT TWO}"},
            "--checkpoint \N{SUPERSCRIPT TWO} is neither none, tempo, drop-activation, "
            "drop-norm, selective, sac-half, sdpa-only, full "
            "nor a number of layers.",
        ),
        ({"vpp": 0}, "--vpp 0 is not a positive number."),
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
def test_layouts_that_mean_nothing(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as refused:
        HandLayout(**values)  # type: ignore[arg-type]
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            HandLayout(tp=3),
            "--tp 3 * --pp 1 = 3 does not divide the 8 GPUs.",
        ),
        (HandLayout(tp=4, pp=4), "--tp 4 * --pp 4 = 16 is more than the 8 GPUs."),
        (
            HandLayout(micro_batch=3),
            "--global-batch 256: dp 8 * micro-batch 3 = 24 does not divide it. "
            "Try --global-batch 240 or 264.",
        ),
        (
            HandLayout(micro_batch=2**32),
            "--global-batch 256: dp 8 * micro-batch 4294967296 = 34359738368 does not divide it. "
            "Try a smaller --micro-batch.",
        ),
        (
            HandLayout(zero=2, offload=Offload(weights=0.5)),
            "runtime torch offloads weights and gradients of a layer together: "
            "their ratios are 0.5 and 0.",
        ),
        (
            HandLayout(pp=4, schedule=ScheduleKind.INTERLEAVED, vpp=3),
            "4 stages of 3 chunks, but toy has 8 layers.",
        ),
        (
            HandLayout(pp=2, zero=3, schedule=ScheduleKind.ZERO_BUBBLE),
            "schedule zero-bubble with ZeRO-3 computes wrong gradients without an error "
            "(parameters are gone when the weight gradients run). Use ZeRO-2, or 1f1b.",
        ),
    ],
)
def test_layouts_that_break_rules(layout: HandLayout, message: str) -> None:
    with pytest.raises(InputError) as refused:
        check(layout)
    assert str(refused.value) == message


def test_layers_are_dealt_out_by_the_runtimes_own_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """nanotron closes a stage when the parameters so far reach its share, those of the head too.

    Eight layers of 8.4 M parameters and a head of 32.8 M are 100 M: 50 M are reached by six layers.
    """
    answer_with(toy_graph(), monkeypatch)
    stages = check(HandLayout(pp=2), runtime="nanotron").plan.stages
    assert [stage.layers for stage in stages] == [((0, 6),), ((6, 2),)]


@pytest.mark.parametrize(
    ("layout", "parts"),
    [
        (HandLayout(pp=4), "4 stages"),
        (HandLayout(pp=2, schedule=ScheduleKind.INTERLEAVED, vpp=2), "2 stages of 2 chunks"),
    ],
)
def test_megatron_deals_out_equal_stages_and_chunks(
    monkeypatch: pytest.MonkeyPatch, layout: HandLayout, parts: str
) -> None:
    answer_with(toy_graph((6,)), monkeypatch)
    with pytest.raises(InputError) as refused:
        check(layout, runtime="megatron")
    assert str(refused.value) == (
        f"runtime megatron does not deal 6 layers out to {parts} by itself. "
        "Give the layers of each stage with --layers, or another --pp."
    )
    assert check(replace(layout, pp=3, vpp=layout.vpp), runtime="megatron", num_gpus=3,
                 global_batch=9).plan.stages[0].num_layers == 2  # fmt: skip


@pytest.mark.slow
def test_a_plan_whose_stages_do_not_go_together_is_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = check(replace(LAYOUT, checkpoint="none")).plan
    first, last = plan.stages
    path = saved(tmp_path, replace(plan, stages=(first, replace(last, zero=0))))
    check_plan(path)
    answer_with(replace(toy_graph(), tied=True), monkeypatch)
    with pytest.raises(PlanError) as refused:
        check_plan(path)
    assert [str(fault) for fault in refused.value.faults] == [
        "stages: toy ties its embedding to its head, so the first and the last stage must agree in "
        "dp, dp_replicate, tp, and in whether zero is 0"
    ]


def test_a_runtime_without_a_selective_level_has_no_selective_layout() -> None:
    with pytest.raises(InputError) as refused:
        check(replace(LAYOUT, checkpoint="selective"), runtime="nanotron")
    assert str(refused.value) == "checkpoint selective: runtime nanotron has none, full."
    found = check(HandLayout(micro_batch=32), runtime="nanotron")
    assert not any("selective" in words for words in found.suggestions)


@pytest.mark.slow
def test_the_margin_decides_what_fits() -> None:
    loose = check(margin_ratio=0.0)
    share = 1 - loose.peak_bytes / loose.limits.device_bytes
    assert check(margin_ratio=share - 1e-6).fits
    tight = check(margin_ratio=share + 1e-6)
    assert not tight.fits
    assert tight.margin_bytes == tight.limits.device_bytes - tight.peak_bytes < 0


def test_suggestions_fit_and_say_what_they_bring() -> None:
    layout = HandLayout(micro_batch=32)
    limits = check(layout, margin_ratio=0.0).limits
    margin = 1 - 0.9 * check(layout).peak_bytes / limits.device_bytes
    tight = check(layout, margin_ratio=margin)
    assert not tight.fits
    assert 1 <= len(tight.suggestions) <= 3
    assert "--micro-batch 16: " in " ".join(tight.suggestions)
    again = check(replace(layout, micro_batch=16), margin_ratio=margin)
    assert again.fits


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_plan_is_judged_as_its_layout_was(tmp_path: Path) -> None:
    first, again = check(), check_plan(saved(tmp_path))
    assert again.plan == first.plan
    assert again.limits == first.limits
    assert again.notes == ("made by hand",)  # a plan names its device and cluster
    assert first.notes[2:] == again.notes


@pytest.mark.slow
def test_a_plan_keeps_its_margin_unless_another_is_given(tmp_path: Path) -> None:
    path = saved(tmp_path, check(margin_ratio=0.3).plan)
    assert check_plan(path).limits == check(margin_ratio=0.3).limits
    assert check_plan(path, margin_ratio=0.1).limits == check(margin_ratio=0.1).limits


@pytest.mark.slow
def test_a_stale_estimate_is_replaced(tmp_path: Path) -> None:
    plan = check().plan
    stale = replace(plan, estimate=replace(plan.estimate, step_s=1e-3))
    assert check_plan(saved(tmp_path, stale)).plan == plan


@pytest.mark.slow
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
    seven = {"num_params": 7, "num_trainable": 7}
    other = replace(toy_graph((9,)), name="other", fingerprint="sha256:other", **seven)
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
    away = Offload(weights=0.5, grads=0.5)
    odd = replace(
        plan,
        cluster=replace(plan.cluster, gpus_per_node=4),
        workload=replace(plan.workload, compile=True),
        stages=(
            replace(first, sp=False, offload=Offload(optimizer=0.5)),
            replace(second, tp=1, cp=2, ep=2, sp=False, offload=away),
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
        "  stages[1].cp: cp 2: context parallelism is not predicted or run yet; use 1.\n"
        "  stages[1].ep: ep 2: expert parallelism is not predicted or run yet; use 1.\n"
        "  stages[1].offload.weights: offloading weights needs ZeRO-2 or more under runtime torch, "
        "found ratio 0.5 at ZeRO-1.\n"
        "  stages[1].offload.grads: offloading grads needs ZeRO-2 or more under runtime torch, "
        "found ratio 0.5 at ZeRO-1."
    )


def test_a_runtime_that_cannot_do_what_a_plan_says(tmp_path: Path) -> None:
    """A plan for torch, judged for nanotron: selective layers, chunks and offloading are faults."""
    layout = HandLayout(
        pp=2,
        checkpoint="selective",
        schedule=ScheduleKind.INTERLEAVED,
        vpp=2,
        offload=Offload(optimizer=0.5),
    )
    path = saved(tmp_path, replace(check(layout).plan, runtime="nanotron"))
    with pytest.raises(PlanError) as refused:
        check_plan(path)
    assert [str(fault) for fault in refused.value.faults] == [
        "schedule.kind: schedule interleaved: runtime nanotron has gpipe, 1f1b.",
        *(
            f"stages[{i}].offload.optimizer: offloading optimizer is not possible under runtime "
            "nanotron, found ratio 0.5 at ZeRO-0."
            for i in range(2)
        ),
        *(
            f"stages[{i}].memory: checkpoint selective: runtime nanotron has none, full."
            for i in range(2)
        ),
    ]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(
            HandLayout(pp=2, schedule=ScheduleKind.INTERLEAVED, vpp=2, checkpoint="3"),
            id="interleaved",
        ),
        pytest.param(
            HandLayout(zero=3, offload=Offload(weights=0.5, grads=0.5, optimizer=0.25)),
            id="offloaded",
        ),
        *(
            pytest.param(layout, id=name, marks=pytest.mark.slow)
            for name, layout in {
                "zero-bubble": HandLayout(pp=2, zero=2, schedule=ScheduleKind.ZERO_BUBBLE),
                "gpipe": HandLayout(
                    pp=4, schedule=ScheduleKind.GPIPE, offload=Offload(activations=0.75)
                ),
                "copies": HandLayout(zero=2, dp_replicate=4),
            }.items()
        ),
    ],
)
def test_every_layout_survives_its_file(tmp_path: Path, layout: HandLayout) -> None:
    first, again = check(layout), check_plan(saved(tmp_path, check(layout).plan))
    assert again.plan == first.plan
    assert again.limits == first.limits


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
        f"stages[0].tp: {message}",
        f"stages[1].tp: {message}",
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


@pytest.mark.slow
def test_the_model_is_looked_for_beside_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path)
    asked = answer_with(toy_graph(), monkeypatch)
    check_plan(path)
    (tmp_path / "toy.py").write_text("")
    check_plan(path, access=TRUSTED)  # a file there would run
    assert asked == ["toy.py", str(tmp_path / "toy.py")]


def test_an_empty_cluster_name_is_refused() -> None:
    with pytest.raises(InputError, match="--cluster '' is no name"):
        Question(model="toy", num_gpus=8, cluster="")


V100_BF16 = (
    "v100-sxm-32 has no bf16 in hardware: matrix products run in fp32, at an eighth of the fp16 "
    "rate (NVIDIA Volta whitepaper: tensor cores take fp16)"
)
V100_FLASH = (
    "v100-sxm-32 has no flash in hardware: torch runs its memory-efficient kernel, whose time is a "
    "guess here (torch's flash attention needs compute capability 8.0, V100 has 7.0)"
)


@pytest.mark.parametrize(
    ("gpu", "precision", "attention", "notes"),
    [
        ("v100-sxm-32", Precision.BF16, Attention.FLASH, [V100_BF16, V100_FLASH]),
        ("v100-sxm-32", Precision.BF16, Attention.MATH, [V100_BF16]),
        ("v100-sxm-32", Precision.FP16, Attention.FLASH, [V100_FLASH]),
        ("a100-sxm-40", Precision.BF16, Attention.FLASH, []),
    ],
)
def test_what_the_hardware_lacks_is_said(
    gpu: str, precision: Precision, attention: Attention, notes: list[str]
) -> None:
    runtime = "fsdp1" if precision is Precision.FP16 else "torch"  # mist apply scales no losses
    layout = HandLayout(zero=3)
    found = check(layout, gpu=gpu, precision=precision, attention=attention, runtime=runtime)
    assert {*notes, "made by hand"} <= {*found.notes}
    assert not any("in hardware" in note for note in {*found.notes} - {*notes})


def test_eight_v100_stand_in_one_machine_unless_they_are_asked_apart() -> None:
    layout = HandLayout(zero=3)
    beside = check(layout, gpu="v100-sxm-32").plan
    assert (beside.cluster.name, beside.cluster.gpus_per_node) == ("dgx-1-v100", 8)
    apart = check(layout, gpu="v100-sxm-32", cluster="one-gpu")
    assert apart.notes[-1] == (
        "8 GPUs of one-gpu are as many machines of one GPU, 3.12 GB/s apart (guess: 25 Gb/s "
        "Ethernet). For GPUs in one machine name another --cluster"
    )
    assert apart.plan.estimate.step_s > beside.estimate.step_s


def test_no_device_has_machines_of_one_gpu_unasked() -> None:
    for path in list_profiles(Family.DEVICE):
        cluster = load_cluster(load_device(path).profile.default_cluster).profile
        assert cluster.num_gpus_per_node > 1


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_advice_that_changes_nothing_is_not_given(zero: int) -> None:
    """On one data-parallel rank all ZeRO levels are one: "--zero 0: 1.19 s" was said of 1.19 s."""
    found = check(HandLayout(tp=8, zero=zero, micro_batch=8))
    assert found.fits
    now = format_seconds(found.plan.estimate.step_s)
    for words in found.suggestions:
        assert not words.startswith("--zero")
        assert f": {now} per step" not in words
