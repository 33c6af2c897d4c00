"""`mist export` and `mist check FILE`: losses, refusals and what is asked for, word by word."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mist.cli.application import app
from mist.errors import InputError, OutputError
from mist.export.command_words import options_of
from mist.export.deepspeed_json import read_deepspeed
from mist.export.megatron_arguments import layout_words, read_megatron
from mist.export.rounding import expressible
from mist.export.target import ExportSource
from mist.export.targets import TARGETS, target_named
from mist.export.torchtitan_settings import read_torchtitan
from mist.plans.file import save_plan
from mist.plans.plan import Offload, Plan
from mist.plans.workload import HeadMode, MemoryLevel
from mist.workflow.checking import HandLayout, check_layout
from mist.workflow.exporting import export_plan
from mist.workflow.foreign_files import check_file, foreign_file
from mist.workflow.plan_model import TRUSTED
from mist.workflow.request import Question
from tests.sample_plans import sample_plan, stage_plan
from tests.toys import toy_graph
from tests.workflow.answering import answer_with


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(toy_graph(), monkeypatch)


def losses(name: str, plan: Plan) -> list[str]:
    can = target_named(name).expresses
    assert can is not None
    return [str(loss) for loss in expressible(plan, name, can)[1]]


def with_stages(**changes: object) -> Plan:
    return sample_plan(stages=(stage_plan(**changes), stage_plan(first=8, device=4, **changes)))


def test_a_plan_that_can_be_said_loses_nothing() -> None:
    assert losses("megatron", sample_plan()) == []


def test_recomputation_is_rounded_up_to_one_number_for_all_stages() -> None:
    few, many = ({MemoryLevel.NONE: 8 - n, MemoryLevel.FULL: n} for n in (1, 3))
    plan = sample_plan(stages=(stage_plan(memory=few), stage_plan(first=8, device=4, memory=many)))
    assert losses("megatron", plan) == [
        "ROUNDED stages[0].memory: 7 none 1 full -> 5 none 3 full (megatron recomputes the same "
        "number of whole layers in each chunk, or a part of all layers)"
    ]
    assert "memory" not in " ".join(losses("torchtitan", plan))  # it has a list of layers


@pytest.mark.parametrize("name", ["megatron", "torchtitan"])
def test_converted_layers_are_run_again_whole(name: str) -> None:
    """Both have layers that repeat a part, but keep more of them than a converted layer does."""
    counts = {"none": 5, "drop-norm": 2, "selective": 1}
    memory = {MemoryLevel(level): count for level, count in counts.items()}
    plan = with_stages(memory=memory, tp=1, dp=4, micro_batch=1, sp=False)
    found = [loss for loss in losses(name, plan) if ".memory" in loss]
    for stage, loss in zip((0, 1), found, strict=True):
        assert loss.startswith(
            f"ROUNDED stages[{stage}].memory: 5 none 2 drop-norm 1 selective -> 5 none 3 full ("
        )


@pytest.mark.parametrize(
    ("changes", "parts"),
    [({}, ["too new", "own rules"]), ({"tp": 1, "dp": 4, "micro_batch": 1, "sp": False}, [])],
)
def test_what_is_said_of_tensor_parallelism(changes: dict[str, object], parts: list[str]) -> None:
    """accelerate 1.15.0 imports what transformers 5.6.0 and later do not have, and divides less."""
    plan = with_stages(**changes)
    written = target_named("accelerate").write(ExportSource(plan=plan, path="p", config={}))
    about = [loss.message for loss in written.added if loss.field == "stages[].tp"]
    assert [part in message for part, message in zip(parts, about, strict=True)] == [True] * len(
        parts
    )


def test_offloading_that_differs_is_said_in_words() -> None:
    whole = stage_plan(first=8, device=4, offload=Offload(weights=1.0, optimizer=0.5))
    (refused,) = (
        line
        for line in losses("megatron", sample_plan(stages=(stage_plan(), whole)))
        if "stages differ" in line
    )
    assert "stages differ (nothing, weights 1 + optimizer 0.5); megatron has" in refused


@pytest.mark.parametrize(
    ("name", "level", "changes"),
    [
        ("torchtitan", "sac-half", False),  # SelectiveAC keeps the same results
        ("megatron", "sac-half", True),
        ("torchtitan", "sdpa-only", True),
    ],
)
def test_a_part_that_a_target_has_not_is_run_again_whole(
    name: str, level: str, changes: bool
) -> None:
    memory = {MemoryLevel("none"): 0, MemoryLevel(level): 8}
    found = [loss for loss in losses(name, with_stages(memory=memory)) if ".memory" in loss]
    full = f"8 {level} -> 8 full ("
    assert len(found) == 2 * changes
    assert all(full in loss for loss in found)


def test_stages_that_differ_are_refused_by_field() -> None:
    second = stage_plan(first=8, device=4, tp=1, dp=4, micro_batch=1, sp=False)
    assert losses("megatron", sample_plan(stages=(stage_plan(), second))) == [
        "REFUSED stages[].tp: stages differ (2, 1); megatron has the same in every stage",
        "REFUSED stages[].dp: stages differ (2, 4); megatron has the same in every stage",
        "REFUSED stages[].micro_batch: stages differ (2, 1); megatron has the same in every stage",
        "REFUSED stages[].sp: stages differ (True, False); megatron has the same in every stage",
    ]


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        (
            "megatron",
            {"offload": Offload(activations=0.5)},
            "REFUSED stages[].offload.activations: 0.5; megatron offloads no share of it",
        ),
        (
            "megatron",
            {"zero": 2, "offload": Offload(optimizer=0.5)},
            "REFUSED stages[].offload.optimizer: 0.5 at ZeRO-2; megatron needs ZeRO-1 for it",
        ),
        (
            "torchtitan",
            {"zero": 1},
            "ROUNDED stages[].zero: 1 -> 2 (torchtitan has no such level)",
        ),
        (
            "deepspeed",
            {},
            "REFUSED stages: 2 pipeline stages; deepspeed files say one only",
        ),
    ],
)
def test_what_targets_cannot_say(name: str, changes: dict[str, object], expected: str) -> None:
    assert losses(name, with_stages(**changes)) == [expected]


@pytest.mark.parametrize("name", ["torchtitan", "megatron"])
def test_a_head_without_all_logits_is_refused(name: str) -> None:
    first, last = sample_plan().stages
    plan = sample_plan(stages=(first, replace(last, head=HeadMode.IN_FORWARD)))
    assert (
        f"REFUSED stages[].head: in-forward; {name} files do not say how the loss runs"
        in losses(name, plan)
    )


def test_the_layout_string_of_uneven_stages() -> None:
    """The example of megatron/training/arguments.py: E and L stand with the first and last part."""
    assert layout_words((9, 8, 8, 7)) == "Et*9|t*8|t*8|t*7L"


def test_scripts_are_read_without_running_them(tmp_path: Path) -> None:
    bait = tmp_path / "ran"
    script = f"""
TP=${{TP:-4}}
PP=2
touch {bait}; $(touch {bait})
ARGS=(
    --tensor-model-parallel-size ${{TP:-4}} # a comment with --pipeline-model-parallel-size 9
    --pipeline-model-parallel-size $PP
    --pipeline-model-parallel-layout 'Ettt|t*5L'
    --recompute-granularity full --recompute-method block --recompute-num-layers 2
    --global-batch-size 64 --micro-batch-size=2 --fp8-format hybrid --bf16
)
"""
    found = read_megatron(script, "run.sh")
    assert found.knobs == {"tp": 4, "pp": 2, "vpp": 1, "zero": 0, "micro_batch": 2}
    assert (found.layers, found.checkpoint, found.global_batch) == ((3, 5), "2", 64)
    assert found.unmodelled == ("--fp8-format hybrid",)
    assert not bait.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--tensor-model-parallel-size two",
            "f.sh: --tensor-model-parallel-size two is no whole number.",
        ),
        (
            "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|m|L",
            "f.sh: --pipeline-model-parallel-layout Et|m|L: part 'm': only E, t, t*9, L and | of "
            "it are read.",
        ),
        (
            "--optimizer-cpu-offload --optimizer-offload-fraction 1.7",
            "f.sh: --optimizer-offload-fraction 1.7 is no ratio from 0 to 1.",
        ),
        ("--bf16 'open", "f.sh is no list of options: no closing quotation."),
    ],
)
def test_broken_arguments_are_named(words: str, message: str) -> None:
    with pytest.raises(InputError) as raised:
        read_megatron(words, "f.sh")
    assert str(raised.value) == message


def test_a_list_on_the_command_line_of_torchtitan_is_refused() -> None:
    """It takes such a list apart at its commas, without an error."""
    words = "--parallelism.module_fqns_per_model_part '[[\"a\"]]'"
    with pytest.raises(InputError, match=r"is no list of lists of names. Write it in Python"):
        read_torchtitan(words, "f.sh")


def test_options_of_torchtitan() -> None:
    words = "torchtitan --parallelism.tensor_parallel_degree 2 --training.local-batch-size 4 "
    more = "--parallelism.enable_async_tensor_parallel --metrics.log_freq 10"
    found = read_torchtitan(words + more, "f.sh")
    assert (found.knobs["tp"], found.knobs["micro_batch"], found.knobs["zero"]) == (2, 4, 3)
    assert found.unmodelled == ("parallelism.enable_async_tensor_parallel = True",)
    assert found.untouched == ("metrics.log_freq",)


def test_a_value_that_the_trainer_sets_says_nothing() -> None:
    text = '{"train_batch_size": "auto", "zero_optimization": {"stage": 2, "round_robin": true}}'
    found = read_deepspeed(text, "ds.json")
    assert (found.global_batch, found.knobs) == (None, {"tp": 1, "zero": 2})
    assert found.unmodelled == ("zero_optimization.round_robin = True",)


def test_options_have_the_values_up_to_the_next_one() -> None:
    assert options_of("python x.py --a 1 2 --b --c=3", "f") == {
        "--a": ("1", "2"),
        "--b": (),
        "--c": ("3",),
    }


def a_plan(folder: Path, **changes: object) -> Path:
    question = Question(model="toy.py", num_gpus=8, seq_len=2048, global_batch=64)
    plan = check_layout(question, HandLayout(**changes)).plan
    save_plan(plan, folder / "plan.yaml")
    return folder / "plan.yaml"


def test_the_rounded_plan_is_judged_as_the_target_runs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mist.workflow.exporting._config", lambda _: {})
    path = a_plan(tmp_path, tp=2, pp=2, zero=1)
    exported = export_plan(path, target_named("megatron"), access=TRUSTED)
    assert exported.judged is not None
    assert exported.judged.plan.runtime == "megatron"
    assert exported.judged.fits
    assert sorted(exported.files) == ["launch.sh", "megatron_arguments.sh"]
    assert "export CUDA_DEVICE_MAX_CONNECTIONS=1" in exported.files["launch.sh"]


def test_a_refused_export_names_every_field(tmp_path: Path) -> None:
    path = a_plan(tmp_path, pp=2)
    with pytest.raises(InputError) as raised:
        export_plan(path, target_named("accelerate"), access=TRUSTED)
    assert str(raised.value).splitlines()[1:] == [
        "  REFUSED stages: 2 pipeline stages; accelerate files say one only",
        "Plan for it: mist plan --runtime torch --set pp=1 --forbid offload.",
    ]


def test_what_a_file_leaves_open_is_asked_for_by_name(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2}}')
    file = foreign_file(str(path))
    assert file is not None
    with pytest.raises(InputError) as raised:
        check_file(file, Question(model="toy.py", num_gpus=8), HandLayout(), {})
    assert str(raised.value) == (
        f"mist check {path}: a file of deepspeed does not say MODEL, --seq, --global-batch, "
        "--micro-batch, --checkpoint, --gpus. Give them too."
    )


def test_an_unknown_target() -> None:
    with pytest.raises(InputError, match="--to megatorn: Did you mean megatron"):
        target_named("megatorn")


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_path_cannot_leave_its_comment_or_its_word(target: object) -> None:
    """A line break or a quote in a name is data of a script, not a command."""
    name = "a\n'; touch x #.yaml"
    written = target.write(ExportSource(plan=fitting(target), path=name, config={}))  # type: ignore[attr-defined]
    for text in written.files.values():
        assert not any(line.startswith("'; touch") for line in text.splitlines()[:3])


def fitting(target: object) -> Plan:
    can = target.expresses  # type: ignore[attr-defined]
    plan = replace(sample_plan(), runtime="torch")
    return expressible(plan, target.name, can)[0] if can else plan  # type: ignore[attr-defined]


def test_the_command_writes_all_files_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of somebody else stops every one of them; a file of ours is written over."""
    monkeypatch.setattr("mist.workflow.exporting._config", lambda _: {})
    plan, out = a_plan(tmp_path, tp=2, zero=1), tmp_path / "out"
    words = ["export", str(plan), "--trust", "--to", "megatron", "--out", str(out)]
    first = CliRunner().invoke(app, words)
    assert (first.exit_code, first.exception) == (0, None)
    assert "Under runtime megatron it fits" in first.output
    assert CliRunner().invoke(app, words).exit_code == 0
    (out / "launch.sh").write_text("mine")
    (out / "megatron_arguments.sh").unlink()
    refused = CliRunner().invoke(app, words)
    assert isinstance(refused.exception, OutputError)
    assert not (out / "megatron_arguments.sh").exists()
    assert CliRunner().invoke(app, [*words, "--force"]).exit_code == 0


def test_json_has_every_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mist.workflow.exporting._config", lambda _: {})
    plan = a_plan(tmp_path, zero=1)
    words = ["export", str(plan), "--trust", "--to", "torchtitan", "--out", str(tmp_path / "o")]
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert found["losses"][0] == {
        "kind": "ROUNDED",
        "field": "stages[].zero",
        "message": "1 -> 2 (torchtitan has no such level)",
    }
    assert (found["fits"], found["runtime"]) == (True, "torch")
