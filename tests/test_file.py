"""Plan files: saved ones load unchanged, faults are told at once, no file is half written."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings

from mist.errors import InputError, OutputError, PlanError
from mist.files import write_bytes, write_text
from mist.plans.file import dump_plan, load_plan, save_plan
from mist.plans.plan import Plan
from mist.plans.workload import MemoryLevel
from tests.sample_plans import estimate_of, plans, sample_plan, stage_estimate, stage_plan

Data = dict[str, object]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(plan=plans())
@example(plan=sample_plan())
def test_a_saved_plan_loads_equal_and_saves_to_the_same_bytes(tmp_path: Path, plan: Plan) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    save_plan(plan, first)
    loaded = load_plan(first)
    assert loaded == plan
    save_plan(loaded, second)
    assert first.read_bytes() == second.read_bytes()


def test_rounding_noise_and_negative_deltas_load(tmp_path: Path) -> None:
    stage = replace(
        stage_estimate(), delta_s=-3e-17, time_parts_s={"compute": 0.1 + 0.2, "launch": -1e-300}
    )
    plan = sample_plan(estimate=estimate_of(stage, stage))
    save_plan(plan, tmp_path / "plan.yaml")
    assert load_plan(tmp_path / "plan.yaml") == plan


def test_memory_levels_keep_their_order(tmp_path: Path) -> None:
    levels = {MemoryLevel.FULL: 3, MemoryLevel.NONE: 5}
    stages = (stage_plan(memory=levels), stage_plan(first=8, device=4))
    save_plan(sample_plan(stages=stages), tmp_path / "plan.yaml")
    assert [*load_plan(tmp_path / "plan.yaml").stages[0].memory] == [*levels]


def test_the_file_is_the_documented_one() -> None:
    text = dump_plan(sample_plan())
    assert text.startswith("schema: mist.plan/1\nmodel: {source: models/toy.py, name: toy, ")
    assert "  devices: [0, 4]\n  dp: 2\n  tp: 2\n  sp: true\n" in text
    assert "memory: {none: 7, full: 1}" in text
    assert "dp_replicate" not in text
    assert [*yaml.safe_load(text)] == [
        "schema",
        "model",
        "workload",
        "cluster",
        "runtime",
        "schedule",
        "num_micro_batches",
        "stages",
        "estimate",
        "alternatives",
        "excluded",
        "provenance",
    ]


def plan_data() -> Data:
    data: Data = json.loads(json.dumps(yaml.safe_load(dump_plan(sample_plan()))))
    return data


def put(path: str, value: object) -> Callable[[Data], None]:
    """A change of plan data: the value at a dotted path; a missing last key is added."""
    *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]

    def change(data: Data) -> None:
        place: object = data
        for step in steps:
            place = place[step]  # type: ignore[index]
        place[last] = value  # type: ignore[index]

    return change


def drop(data: Data) -> None:
    del data["runtime"]


FAULTS: list[tuple[str, list[Callable[[Data], None]], list[str]]] = [
    ("unknown key", [put("stages.1.colour", "red")], ["stages[1].colour: unknown key"]),
    ("unknown key of the workload", [put("workload.lr", 1)], ["workload.lr: unknown key"]),
    ("unknown key at the top", [put("colour", "red")], ["colour: unknown key"]),
    ("missing key", [drop], ["runtime: missing"]),
    (
        "wrong schema",
        [put("schema", "mist.plan/2")],
        ["schema: input should be 'mist.plan/1' (found \"mist.plan/2\")"],
    ),
    (
        "wrong type",
        [put("stages.0.dp", "4")],
        ['stages[0].dp: input should be a valid integer (found "4")'],
    ),
    (
        "a number with a point is no count",
        [put("stages.0.tp", 2.0)],
        ["stages[0].tp: input should be a valid integer (found 2.0)"],
    ),
    (
        "true is no count",
        [put("stages.0.tp", True)],
        ["stages[0].tp: input should be a valid integer (found true)"],
    ),
    (
        "no mapping",
        [put("stages.0.offload", [1])],
        ["stages[0].offload: input should be an object"],
    ),
    (
        "a ratio of 1.5",
        [put("stages.1.offload.optimizer", 1.5)],
        ["stages[1].offload.optimizer: input should be less than or equal to 1 (found 1.5)"],
    ),
    (
        "no number",
        [put("estimate.step_s", float("nan"))],
        ["estimate.step_s: input should be a finite number (found NaN)"],
    ),
    (
        "a sequence of nothing",
        [put("workload.seq_len", 0)],
        ["workload.seq_len: input should be greater than or equal to 1 (found 0)"],
    ),
    (
        "unknown precision",
        [put("workload.precision", "bf8")],
        ["workload.precision: input should be 'bf16', 'fp16' or 'fp32' (found \"bf8\")"],
    ),
    (
        "unknown kind of a figure",
        [put("estimate.op_costs.0.kind", "sure")],
        [
            "estimate.op_costs[0].kind: input should be 'spec', 'fit', 'calibrated', 'measured', "
            "'guess' or 'given' (found \"sure\")"
        ],
    ),
    (
        "unknown memory level",
        [put("stages.0.memory", {"none": 7, "some": 1})],
        [
            "stages[0].memory.some: input should be 'none', 'tempo', 'drop-activation', "
            "'drop-norm', 'selective', 'sac-half', 'sdpa-only' or 'full' (found \"some\")"
        ],
    ),
    (
        "levels that do not sum",
        [put("stages.0.memory.full", 3)],
        ["stages[0].memory: levels cover 10 layers, but the stage has 8"],
    ),
    (
        "no layers",
        [put("stages.1.layers", [])],
        ["stages[1].layers: a stage has at least one run of layers"],
    ),
    (
        "a gap between layers",
        [put("stages.1.layers", [[9, 8]])],
        ["stages[1].layers: layers [9, 8] leave a gap after those before, which end at 7"],
    ),
    (
        "layers twice",
        [put("stages.1.layers", [[7, 8]])],
        ["stages[1].layers: layers [7, 8] overlap those before, which end at 7"],
    ),
    (
        "layers that do not start at 0",
        [put("stages.0.layers", [[1, 7]]), put("stages.0.memory", {"none": 7})],
        ["stages[0].layers: layers [1, 7] do not start at 0"],
    ),
    (
        "an empty run",
        [put("stages.1.layers", [[8, 0]]), put("stages.1.memory", {"none": 0})],
        ["stages[1].layers: a run of 0 layers"],
    ),
    (
        "runs of one chunk",
        [put("stages.1.layers", [[8, 4], [12, 4]])],
        ["stages[1].layers: 2 runs of layers, but the schedule has 1 per stage"],
    ),
    (
        "chunks that 1F1B does not take in turn",
        [
            put("schedule.vpp", 2),
            put("stages.0.layers", [[0, 4], [8, 4]]),
            put("stages.1.layers", [[4, 4], [12, 4]]),
        ],
        ["schedule.vpp: 1f1b runs one chunk per stage, found 2"],
    ),
    (
        "nothing to interleave",
        [put("schedule.kind", "interleaved")],
        ["schedule.vpp: interleaved needs at least 2 chunks per stage"],
    ),
    (
        "devices that overlap",
        [put("stages.1.devices", [3, 4])],
        [
            "stages[1].devices: devices [3, 4] overlap those before, which end at 3",
            "cluster.num_gpus: the stages use 7 devices, the cluster has 8",
        ],
    ),
    (
        "devices with a gap",
        [put("stages.1.devices", [5, 4]), put("cluster.num_gpus", 9)],
        ["stages[1].devices: devices [5, 4] leave a gap after those before, which end at 3"],
    ),
    (
        "devices of another number of ranks",
        [put("stages.1.devices", [4, 5]), put("cluster.num_gpus", 9)],
        ["stages[1].devices: dp * tp * cp = 2 * 2 * 1 ranks, but the stage has 5 devices"],
    ),
    ("ep", [put("stages.0.ep", 4)], ["stages[0].ep: ep 4 does not divide dp * cp = 2"]),
    (
        "a head before the last stage",
        [put("stages.0.head", "checkpointed")],
        ["stages[0].head: only the last stage has a head; use none"],
    ),
    (
        "copies that do not divide dp",
        [put("stages.0.dp_replicate", 3)],
        ["stages[0].dp_replicate: 3 copies of the states do not divide dp 2"],
    ),
    (
        "a copy on every rank",
        [put("stages.0.dp_replicate", 2)],
        ["stages[0].dp_replicate: a whole copy on each of dp 2 ranks is zero 0"],
    ),
    (
        "copies of what is not divided",
        [
            put("stages.0.zero", 0),
            put("stages.0.dp", 4),
            put("stages.0.tp", 1),
            put("stages.0.sp", False),
            put("stages.0.micro_batch", 1),
            put("stages.0.dp_replicate", 2),
        ],
        ["stages[0].dp_replicate: zero 0 has a copy on every rank already; use zero 1 to 3"],
    ),
    (
        "sp without tp",
        [put("stages.0.tp", 1), put("stages.0.cp", 2)],
        ["stages[0].sp: sequence parallelism needs tp > 1"],
    ),
    (
        "unequal samples",
        [put("stages.1.micro_batch", 4)],
        ["stages[1].micro_batch: dp * micro_batch = 8, but 4 in the first stage"],
    ),
    (
        "G that does not match",
        [put("num_micro_batches", 4)],
        [
            "num_micro_batches: dp * micro_batch * num_micro_batches = 4 * 4 = 16, "
            "but the global batch is 32"
        ],
    ),
    ("no stages", [put("stages", [])], ["stages: a plan has at least one stage"]),
    (
        "an estimate of other stages",
        [put("estimate.stages", [])],
        ["estimate.stages: 0 stages judged, but the plan has 2"],
    ),
]


def test_data_without_a_change_loads(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan_data()))
    assert load_plan(tmp_path / "plan.yaml") == sample_plan()


@pytest.mark.parametrize(
    ("changes", "faults"), [row[1:] for row in FAULTS], ids=[r[0] for r in FAULTS]
)
def test_a_fault_is_told_with_its_path(
    tmp_path: Path, changes: list[Callable[[Data], None]], faults: list[str]
) -> None:
    data = plan_data()
    for change in changes:
        change(data)
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(PlanError) as refused:
        load_plan(path)
    assert [str(fault) for fault in refused.value.faults] == faults


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    data = plan_data()
    for change in (
        put("schema", "plan"),
        put("stages.0.colour", "red"),
        put("stages.0.offload.weights", -0.5),
        put("stages.1.layers", [[8, 9]]),
        put("stages.1.devices", [2, 4]),
    ):
        change(data)
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(PlanError) as refused:
        load_plan(path)
    assert str(refused.value) == (
        f"{path} has 6 faults:\n"
        "  schema: input should be 'mist.plan/1' (found \"plan\")\n"
        "  stages[0].offload.weights: input should be greater than or equal to 0 (found -0.5)\n"
        "  stages[0].colour: unknown key\n"
        "  stages[1].memory: levels cover 8 layers, but the stage has 9\n"
        "  stages[1].devices: devices [2, 4] overlap those before, which end at 3\n"
        "  cluster.num_gpus: the stages use 6 devices, the cluster has 8"
    )


def test_a_key_given_twice_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    text = dump_plan(sample_plan())
    twice = text.replace("  dp: 2\n", "  dp: 2\n  dp: 2\n", 1).replace(
        "{none: 7,", "{none: 7, none: 7,"
    )
    path.write_text(f"{twice}runtime: torch\n")
    with pytest.raises(PlanError) as refused:
        load_plan(path)
    assert [str(fault) for fault in refused.value.faults] == [
        "stages[0].dp: given twice",
        "stages[0].memory.none: given twice",
        "stages[1].memory.none: given twice",
        "runtime: given twice",
    ]


@pytest.mark.parametrize("text", ["", "- 1\n", "plan\n"])
def test_yaml_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        load_plan(path)
    assert str(refused.value) == f"{path} is not a plan: it has no mist.plan/1 mapping."


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [1", "expected ',' or ']'"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
        ("a: &here [*here]", "*here contains itself"),
        ("? [1, 2]\n: 3", "found unhashable key"),
        ("a: !!binary aGVsbG8=", "a file of Mist holds no binary"),
        ("a: !!python/object:os.system {}", "could not determine a constructor"),
        ("a: \x00", "control characters are not allowed"),
    ],
)
def test_what_is_not_yaml_of_ours(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        load_plan(path)
    assert str(refused.value).startswith(f"{path} is not YAML: ")
    assert reason in str(refused.value)


def test_a_date_is_text(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(dump_plan(sample_plan()).replace("mist: 0.1.0", "mist: 2026-01-01"))
    assert load_plan(path).provenance.mist == "2026-01-01"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing, binary = tmp_path / "missing.yaml", tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\xfd")
    for path, reason in (
        (missing, "No such file or directory"),
        (tmp_path, "it is no file"),
        (binary, "it is not text in UTF-8"),
    ):
        with pytest.raises(InputError) as refused:
            load_plan(path)
        assert str(refused.value) == f"{path} cannot be read: {reason}."


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [*tmp_path.iterdir()] == [path]


def test_a_folder_that_takes_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path / "missing" / "plan.yaml", "No such file or directory"),
        (tmp_path / "file" / "plan.yaml", "Not a directory"),
    ):
        with pytest.raises(OutputError) as refused:
            save_plan(sample_plan(), path)
        assert str(refused.value) == f"Cannot write {path}: {reason}. Choose another place."
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["replace", "fchmod"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, step, fail)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as refused:
        write_bytes(path, b"new")
    if expected is OutputError:
        reason = "No space left on device"
        assert str(refused.value) == f"Cannot write {path}: {reason}. Choose another place."
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]
