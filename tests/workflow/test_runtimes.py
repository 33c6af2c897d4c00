"""Every runtime that ships plans, or says what it has; what it plans, `mist check` judges alike."""

from dataclasses import replace
from pathlib import Path

import pytest

from mist.errors import InputError, PlanError
from mist.model.graph import ModelGraph
from mist.plans.file import save_plan
from mist.plans.plan import Offload, Plan
from mist.plans.search_space import SearchSpace, narrowed, space_of
from mist.plans.workload import MemoryLevel, ScheduleKind
from mist.platform.profiles import load_runtime
from mist.workflow.checking import Checked, HandLayout, check_layout, check_plan
from mist.workflow.cluster_choice import offer_of, rent
from mist.workflow.planning import make_plan
from mist.workflow.request import Question
from tests.toys import toy_graph
from tests.workflow.answering import answer_with

RUNTIMES = sorted(path.stem for path in Path("profiles/runtimes").glob("*.yaml"))
GRAPHS = {
    "like": toy_graph((8,)),
    "tied": toy_graph((3, 2), vocab=8192, tied=True),  # two kinds of layers, five in all
}
FAST = ("torch", "megatron", "deepspeed-zero3")  # of each kind of rules one
INTERLEAVED = {"schedule": ScheduleKind.INTERLEAVED, "vpp": 2}


def asked(runtime: str, num_gpus: int = 4) -> Question:
    return Question(
        model="toy.py", num_gpus=num_gpus, runtime=runtime, seq_len=2048, global_batch=16
    )


def checked(runtime: str, num_gpus: int = 4, **knobs: object) -> Checked:
    return check_layout(asked(runtime, num_gpus), HandLayout(**knobs))  # type: ignore[arg-type]


def test_ten_runtimes_ship() -> None:
    assert len(RUNTIMES) == 10


@pytest.mark.parametrize(
    "graph",
    [pytest.param(GRAPHS[n], id=n, marks=[pytest.mark.slow] * (n != "like")) for n in GRAPHS],
)
@pytest.mark.parametrize(
    "runtime",
    [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in RUNTIMES],
)
def test_each_runtime_plans_what_it_can_run(
    runtime: str, graph: ModelGraph, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer_with(graph, monkeypatch)
    planned = make_plan(asked(runtime, 1 if runtime == "torchtune" else 4), SearchSpace())
    knobs = load_runtime(runtime).profile.knobs
    assert planned.points, "the cloud of the picture is empty"
    for layout in planned.points:
        assert len(layout.stages) == 1 or layout.schedule.kind in knobs.schedules
        assert {stage.knobs["zero"] for stage in layout.stages} <= {*knobs.zero_levels}
    save_plan(planned.plan, tmp_path / "plan.yaml")
    assert check_plan(tmp_path / "plan.yaml").plan == planned.plan


@pytest.mark.parametrize(
    ("runtime", "num_gpus", "knobs", "message"),
    [
        (
            "torchtune",
            2,
            {},
            "--gpus 2: runtime torchtune trains on one GPU. "
            "Use --gpus 1, or another runtime (mist profiles lists them).",
        ),
        ("torchtune", 1, {"zero": 3}, "zero 3: runtime torchtune has zero 0."),
        ("torchtitan", 4, {"zero": 2}, "zero 2: runtime torchtitan has zero 0, 3."),
        ("megatron", 4, {"zero": 3}, "zero 3: runtime megatron has zero 0, 1."),
        ("fsdp1", 4, {"tp": 2}, "tp 2: runtime fsdp1 has no tensor parallelism; use tp 1."),
        (
            "deepspeed-zero3",
            4,
            {"pp": 2},
            "pp 2: runtime deepspeed-zero3 has no pipelines; use pp 1.\n"
            "schedule 1f1b: runtime deepspeed-zero3 has no pipelines.",
        ),
        (
            "megatron",
            4,
            {"pp": 2, "schedule": ScheduleKind.GPIPE},
            "schedule gpipe: runtime megatron has 1f1b, interleaved.",
        ),
        (
            "aleph",
            4,
            {"pp": 2, **INTERLEAVED},
            "schedule interleaved: runtime aleph has 1f1b.",
        ),
        ("fsdp1", 4, INTERLEAVED, "schedule interleaved: runtime fsdp1 has no pipelines."),
        (
            "nanotron",
            4,
            {"checkpoint": "selective"},
            "checkpoint selective: runtime nanotron has none, full.",
        ),
        (
            "torchtitan",
            4,
            {"checkpoint": "3"},
            "checkpoint none and full in one stage: runtime torchtitan does the same with all "
            "layers of a stage.",
        ),
        (
            "megatron",
            4,
            {"offload": Offload(optimizer=0.5)},
            "offloading optimizer is not possible under runtime megatron, "
            "found ratio 0.5 at ZeRO-0.",
        ),
        (
            "deepspeed-zero3",
            4,
            {"zero": 3, "offload": Offload(activations=1.0)},
            "offloading activations is not possible under runtime deepspeed-zero3.",
        ),
        (
            "fsdp1",
            4,
            {"zero": 3, "dp_replicate": 2},
            "dp_replicate 2: copies of the states are predicted of FSDP2 only, not of runtime "
            "fsdp1; use dp_replicate 1.",
        ),
        (
            "nanotron",
            4,
            {"pp": 2, "layers": (5, 3)},  # by cost: the head of 32000 x 1024 is 4 layers
            "runtime nanotron deals 8 layers out as 6,2 and takes no other split, found 5,3",
        ),
        (
            "megatron-deepspeed",
            4,
            {"pp": 2, "layers": (5, 3)},
            "runtime megatron-deepspeed deals 8 layers out as 4,4 and takes no other split, "
            "found 5,3",
        ),
    ],
)
def test_a_knob_that_a_runtime_does_not_have(
    runtime: str,
    num_gpus: int,
    knobs: dict[str, object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer_with(GRAPHS["like"], monkeypatch)
    with pytest.raises(InputError) as refused:
        checked(runtime, num_gpus, **knobs)
    assert str(refused.value) == message


def test_knobs_are_refused_before_the_model_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = answer_with(GRAPHS["like"], monkeypatch)
    with pytest.raises(InputError):
        checked("torchtitan", zero=2)
    with pytest.raises(InputError):
        space = narrowed(SearchSpace(), fixed=["zero=2"], most=[], forbid=[])
        rent(asked("torchtitan"), offer_of("4", None, None, None), space)
    assert traced == []


@pytest.mark.parametrize(
    ("runtime", "layers", "counts"),
    [("torch", (5, 3), [5, 3]), ("megatron", (5, 3), [5, 3]), ("torchtitan", (3, 5), [3, 5]),
     ("aleph", (4, 4), [4, 4])],
)  # fmt: skip
def test_a_split_that_is_stated(
    runtime: str,
    layers: tuple[int, ...],
    counts: list[int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The plan that is written keeps it, and is judged as the layout was."""
    answer_with(GRAPHS["like"], monkeypatch)
    found = checked(runtime, pp=2, layers=layers)
    assert [stage.num_layers for stage in found.plan.stages] == counts
    save_plan(found.plan, tmp_path / "plan.yaml")
    assert check_plan(tmp_path / "plan.yaml").plan == found.plan


def test_a_split_of_chunks_is_in_the_order_of_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(GRAPHS["like"], monkeypatch)
    plan = checked("torch", pp=2, layers=(1, 3, 2, 2), **INTERLEAVED).plan
    assert [stage.layers for stage in plan.stages] == [((0, 1), (4, 2)), ((1, 3), (6, 2))]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (
            {"pp": 2, "layers": (8,)},
            "--layers 8: 1 numbers for 2 pipeline stages. Give 2, in the order of the layers.",
        ),
        (
            {"pp": 2, "layers": (4, 4), **INTERLEAVED},
            "--layers 4,4: 2 numbers for 2 pipeline stages of 2 chunks. "
            "Give 4, in the order of the layers.",
        ),
        ({"pp": 2, "layers": (4, 5)}, "--layers 4,5: 9 layers in all, but toy has 8."),
        (
            {"pp": 2, "layers": (8, 0)},
            "--layers 8,0: every stage and chunk has at least one layer.",
        ),
    ],
)
def test_a_split_that_cannot_be(
    knobs: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with(GRAPHS["like"], monkeypatch)
    with pytest.raises(InputError) as refused:
        checked("torch", **knobs)
    assert str(refused.value) == message


def faults_of(plan: Plan, path: Path) -> list[str]:
    """What `mist check` finds wrong in a plan file."""
    save_plan(plan, path)
    with pytest.raises(PlanError) as refused:
        check_plan(path)
    return [f"{fault.path}: {fault.message}" for fault in refused.value.faults]


def test_plan_files_are_held_to_the_runtime_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A plan of torch, as if another runtime were to run it."""
    answer_with(GRAPHS["like"], monkeypatch)
    plan = checked("torch", pp=2, zero=2, checkpoint="3", layers=(5, 3)).plan
    first, second = plan.stages
    memory = {MemoryLevel.NONE: 3, MemoryLevel.SELECTIVE: 0, MemoryLevel.FULL: 0}
    stages = (first, replace(second, zero=3, memory=memory))
    path = tmp_path / "plan.yaml"
    assert faults_of(replace(plan, runtime="nanotron", stages=stages), path) == [
        "stages[0].zero: zero 2: runtime nanotron has zero 0, 1.",
        "stages[1].zero: zero 3: runtime nanotron has zero 0, 1.",
        "stages[0].memory: checkpoint none and full in one stage: runtime nanotron does the same "
        "with all layers of a stage.",
        "stages: runtime nanotron has stages alike, these differ in zero",
        "stages: runtime nanotron recomputes as many layers in each stage, found 3, 0 at full",
        "stages: runtime nanotron deals 8 layers out as 6,2 and takes no other split, found 5,3",
    ]
    assert faults_of(replace(plan, runtime="megatron"), path) == [
        "stages[0].zero: zero 2: runtime megatron has zero 0, 1.",
        "stages[1].zero: zero 2: runtime megatron has zero 0, 1.",
    ]


@pytest.mark.parametrize(
    ("runtime", "space", "fixed", "message"),
    [
        ("megatron", "mist", "zero=3", "zero 3: runtime megatron has zero 0, 1."),
        (
            "megatron",
            "fsdp",
            "",
            "zero 2: runtime megatron has zero 0, 1. zero 3: runtime megatron has zero 0, 1.",
        ),
        ("fsdp1", "mist", "tp=2", "tp 2: runtime fsdp1 has no tensor parallelism; use tp 1."),
        (
            "nanotron",
            "mist",
            "checkpoint=selective",
            "checkpoint selective: runtime nanotron has none, full.",
        ),
        (
            "megatron",
            "mist",
            "schedule=gpipe",
            "schedule gpipe: runtime megatron has 1f1b, interleaved.",
        ),
        (
            "nanotron",
            "mist",
            "dp-replicate=2",
            "dp_replicate 2: copies of the states are predicted of FSDP2 only, not of runtime "
            "nanotron; use dp_replicate 1.",
        ),
    ],
)
def test_a_space_of_which_a_runtime_has_nothing(
    runtime: str, space: str, fixed: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with(GRAPHS["like"], monkeypatch)
    allowed = narrowed(space_of(space), fixed=fixed.split(), most=[], forbid=[])
    with pytest.raises(InputError) as refused:
        make_plan(asked(runtime), allowed)
    assert str(refused.value) == message
