"""check(export(plan)) judges the layout of the plan, for what each target can express."""

from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from mist.export.rounding import expressible, refusals_of
from mist.export.target import Configuration, ExportSource, LossKind
from mist.export.targets import TARGETS, target_named, target_of
from mist.plans.memory_levels import LEVELS
from mist.plans.plan import Layout, Plan
from mist.workflow.checking import HandLayout
from mist.workflow.foreign_files import check_file, foreign_file
from mist.workflow.request import Question
from tests.export.legal_plans import SEQ_LEN, legal_plans
from tests.sample_plans import sample_plan
from tests.toys import toy_graph
from tests.workflow.answering import answer_with

READ = [target.name for target in TARGETS if target.read is not None]
FILES = {
    "megatron": "megatron_arguments.sh",
    "torchtitan": "mist_plan/config_registry.py",
    "deepspeed": "deepspeed.json",
    "accelerate": "accelerate.yaml",
    "megatron-bridge": "bridge_plan.py",
    "llamafactory": "llamafactory.yaml",
    "axolotl": "axolotl.yaml",
}
NUM_DRAWN = {"llamafactory": 60}  # one plan of seven has neither stages nor tensor parallelism
NUM_ROUND_TRIPS = 6  # that each target must at least express of those drawn


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(toy_graph(), monkeypatch)
    # Advice judges dozens of other layouts for each one.
    monkeypatch.setattr("mist.workflow.checking.suggestions", lambda *_: ())
    monkeypatch.setattr("mist.workflow.foreign_files.best_instead", lambda *_: ())


def without_sequence(layout: Layout) -> Layout:
    """Whether tensor parallelism shards the sequence is the runtime's own in every prediction."""
    stages = tuple(replace(stage, sp=False) for stage in layout.stages)
    return replace(layout, stages=stages)


def typed_for(said: Configuration, plan: Plan) -> dict[str, object]:
    """What the user must add to a file: the model, the GPUs, and what it leaves open."""
    stage = plan.stages[0]
    answers: dict[str, object] = {
        "seq": SEQ_LEN,
        "global_batch": plan.workload.global_batch,
        "micro_batch": stage.micro_batch,
        "checkpoint": "full" if stage.num_full else "none",
    }
    known = {
        "seq": said.seq_len,
        "global_batch": said.global_batch,
        "micro_batch": said.knobs.get("micro_batch"),
        "checkpoint": said.checkpoint,
    }
    wanted = {name: answers[name] for name, value in known.items() if value is None}
    # torch has figures for every layout; those of other runtimes do not cover all that is drawn.
    if said.num_gpus is None:
        wanted["gpus"] = plan.cluster.num_gpus
    return {"model": "toy.py", "runtime": "torch", **wanted}


def read_back(path: Path, plan: Plan) -> Plan:
    """The plan that `mist check` judges for an exported file."""
    file = foreign_file(str(path))
    assert file is not None
    typed = typed_for(file.configuration, plan)
    assert file.configuration.unmodelled == ()
    question = Question(
        model="toy.py",
        num_gpus=plan.cluster.num_gpus,
        gpu="h100-sxm",
        seq_len=typed.get("seq"),  # type: ignore[arg-type]
        global_batch=typed.get("global_batch", 1),  # type: ignore[arg-type]
    )
    layout = HandLayout(
        micro_batch=typed.get("micro_batch", 1), checkpoint=typed.get("checkpoint", "none")
    )
    return check_file(file, question, layout, typed).plan


# Seconds each: one with a file of settings and one with a line of options stand for all.
SOME = {"torchtitan"}


@pytest.mark.slow
@pytest.mark.parametrize("name", READ)
def test_a_file_is_read_as_the_layout_that_it_was_written_from(name: str, tmp_path: Path) -> None:
    target, round_trips = target_named(name), 0
    assert target.expresses is not None
    most_stages = 4 if target.expresses.schedules else 1

    @hypothesis.settings(max_examples=NUM_DRAWN.get(name, 30))
    @hypothesis.given(plan=legal_plans(most_stages))
    def round_trip(plan: Plan) -> None:
        nonlocal round_trips
        assert target.expresses is not None
        fitting, losses = expressible(plan, name, target.expresses)
        if refusals_of(losses):
            return
        written = target.write(ExportSource(plan=fitting, path="plan.yaml", config={}))
        for file, text in written.files.items():  # one may name another
            (tmp_path / Path(file).name).write_text(text)
        path = tmp_path / Path(FILES[name]).name
        back = read_back(path, fitting)
        assert without_sequence(back.layout) == without_sequence(fitting.layout)
        assert back.workload == fitting.workload
        round_trips += 1

    round_trip()
    assert round_trips >= NUM_ROUND_TRIPS


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[pytest.mark.slow] * (each not in SOME)) for each in READ]
)
@hypothesis.settings(max_examples=25)
@hypothesis.given(data=st.data())
def test_rounding_never_asks_more_of_a_device(name: str, data: st.DataObject) -> None:
    """ZeRO, recomputation and offloading go up; a field that changed has a loss that names it."""
    can = target_named(name).expresses
    assert can is not None
    plan = data.draw(legal_plans())
    fitting, losses = expressible(plan, name, can)
    changed = {loss.field.partition(".")[2] for loss in losses if loss.kind is LossKind.ROUNDED}
    for before, after in zip(plan.stages, fitting.stages, strict=True):
        assert after.zero >= before.zero or before.dp == 1
        assert repeated(after) >= repeated(before)
        assert after.offload.optimizer >= before.offload.optimizer
        differs = {
            "zero": after.zero != before.zero,
            "memory": after.levels != before.levels,
            "offload.optimizer": after.offload != before.offload,
        }
        assert {field for field, is_new in differs.items() if is_new} <= changed


def repeated(stage: object) -> int:
    """Layers that repeat something in the backward pass."""
    return sum(LEVELS[level].repeats != "nothing" for level in stage.levels)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", READ)
def test_a_file_is_known_by_what_is_in_it(name: str) -> None:
    target = target_named(name)
    assert target.expresses is not None
    plan, _ = expressible(sample_plan(), name, target.expresses)
    written = target.write(ExportSource(plan=plan, path="plan.yaml", config={}))
    assert target_of(written.files[FILES[name]]) is target
