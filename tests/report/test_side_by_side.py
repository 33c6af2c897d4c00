"""Plans, configurations and logs in a row: what differs, and by how much."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mist import cli
from mist.calibrate.logs import LoggedRun, StageRow
from mist.plans.file import save_plan
from mist.report.plan_report import sheet_of
from mist.report.side_by_side import (
    print_side_by_side,
    side_by_side_json,
    subject_of_log,
    subject_of_sheet,
)
from tests.sample_plans import sample_plan, stage_plan
from tests.toys import toy_graph
from tests.workflow.answering import answer_with

OTHER = sample_plan(stages=(stage_plan(zero=2), stage_plan(first=8, device=4, zero=2)))
LOG = LoggedRun(seconds=(5.5, 6.5), stages=(StageRow(peak_bytes=2**30, collectives=()),))


def test_only_settings_that_differ_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    other = replace(OTHER, estimate=replace(OTHER.estimate, step_s=6.0))
    print_side_by_side(
        [
            subject_of_sheet("a.yaml", "plan", sheet_of(sample_plan())),
            subject_of_sheet("b.yaml", "plan", sheet_of(other)),
            subject_of_log("run.json", LOG),
        ]
    )
    text = capsys.readouterr().out
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines() if "  " in line}
    assert "5.00 s (+0.0%)" in text and "6.00 s (+20.0%)" in text
    assert lines["zero"][1:] == ["1", "2", "-"]
    assert "sequence" not in lines
    assert "1.0 GiB" in text
    assert "in one line" not in text  # it says the knobs again


def test_a_table_is_as_wide_as_the_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    sheet = replace(sheet_of(OTHER), notes=("a note of many words, " * 9,))
    print_side_by_side(
        [
            subject_of_sheet("a.yaml", "plan", sheet_of(sample_plan())),
            subject_of_sheet("b.yaml", "plan", sheet),
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80


def test_json_has_null_for_what_is_not_said() -> None:
    (log,) = json.loads(json.dumps(side_by_side_json([subject_of_log("run.json", LOG)])))[
        "subjects"
    ]
    assert log["kind"] == "log" and log["step_s"] == 6.0
    assert log["mfu"] is None and log["settings"] == {}


MEGATRON = """pretrain_gpt.py --tensor-model-parallel-size 2 --pipeline-model-parallel-size 1
--micro-batch-size 1 --global-batch-size 16 --seq-length 2048 --bf16 --num-layers 4
"""


def test_a_plan_a_configuration_and_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer_with(toy_graph((4,)), monkeypatch)
    save_plan(sample_plan(), tmp_path / "plan.yaml")
    (tmp_path / "train.sh").write_text(MEGATRON)
    (tmp_path / "run.json").write_text('{"steps": [{"seconds": 1.5}]}')
    monkeypatch.chdir(tmp_path)
    words = "compare plan.yaml train.sh run.json --model llama3-8b --gpus 4 --checkpoint none"
    monkeypatch.setattr(sys, "argv", ["mist", *words.split(), "--json"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    found = capsys.readouterr()
    assert end.value.code == 0, found.err
    subjects = json.loads(found.out)["subjects"]
    assert [each["kind"] for each in subjects] == ["plan", "configuration", "log"]
    assert subjects[1]["settings"]["tp"] == "2"
    assert subjects[1]["settings"]["GPUs"].startswith("4 x ")


def test_one_file_is_nothing_to_compare(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mist", "compare", "plan.yaml"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "mist: mist compare plan.yaml: with what? Give two files or more.\n"
    )
