"""`mist report` as it is typed: which files it writes, and which it does not."""

import json
import sys
from pathlib import Path

import pytest

from mist import cli
from mist.plans.file import save_plan
from mist.workflow.checking import HandLayout, check_layout
from mist.workflow.request import Question
from tests.toys import toy_graph
from tests.workflow.answering import answer_with


@pytest.fixture(autouse=True)
def _plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of a toy in the current folder."""
    answer_with(toy_graph((4,)), monkeypatch)
    question = Question(model="llama3-8b", num_gpus=4, seq_len=2048, global_batch=16)
    monkeypatch.chdir(tmp_path)
    save_plan(check_layout(question, HandLayout(pp=2, zero=1)).plan, "plan.yaml")


def mist(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["mist", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def test_a_page_is_written_beside_the_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mist(monkeypatch, "report", "plan.yaml") == 0
    assert capsys.readouterr().out.endswith("Wrote plan.html.\n")
    assert Path("plan.html").read_text().startswith("<!-- written by `mist report` -->")
    # Its own earlier file may be replaced.
    assert mist(monkeypatch, "report", "plan.yaml") == 0


@pytest.mark.slow
def test_files_that_are_asked_for_are_written_and_no_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--svg", "a.svg", "--trace", "a.json", "--json")
    assert mist(monkeypatch, "report", "plan.yaml", *words) == 0
    assert json.loads(capsys.readouterr().out)["files"] == ["a.svg", "a.json"]
    assert sorted(path.name for path in Path().iterdir()) == ["a.json", "a.svg", "plan.yaml"]
    assert json.loads(Path("a.json").read_text())["traceEvents"]
    # Known as files of Mist, which it may write again.
    assert mist(monkeypatch, "report", "plan.yaml", *words) == 0


def test_somebody_elses_file_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.html").write_text("<p>mine</p>")
    assert mist(monkeypatch, "report", "plan.yaml", "--out", "mine.html") == 2
    assert "exists and is no page of Mist" in capsys.readouterr().err
    assert Path("mine.html").read_text() == "<p>mine</p>"
