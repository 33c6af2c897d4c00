"""The help of each command: whole sentences in groups, and an example that is a real command."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer.main

from mist import cli
from mist.cli.application import app
from mist.plans.file import save_plan
from mist.workflow.checking import HandLayout, check_layout
from mist.workflow.request import Question
from tests.fast_cases import first_fast
from tests.report.json_faults import faults_of
from tests.toys import toy_graph
from tests.validate.test_predict import HEAD, ROW
from tests.workflow.answering import answer_with

ROOT = Path(__file__).parents[1]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
# Those that end within seconds and read what a checkout has.
QUICK = ("convert", "profiles", "trace", "check", "plan")
# Those that read plans, logs and tables.
OF_FILES = ("calibrate", "compare", "export", "report", "validate")
SLOW = ("calibrate", "validate")  # they trace or fit; what they do is tested elsewhere
RUNNING = ("apply", "profile", "verify")


def example_of(name: str) -> list[str]:
    words = COMMANDS[name].epilog
    assert words.startswith(f"mist {name} ")
    return shlex.split(words)


def help_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["mist", *words, "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_a_command_is_a_call_of_it(name: str, tmp_path: Path) -> None:
    """What parses has the options and the types that the command takes."""
    _, _, *arguments = example_of(name)
    with COMMANDS[name].make_context(name, arguments) as context:
        assert context.params


def run_example(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: str
) -> str:
    """The example as it is typed, and `more`; what it printed."""
    monkeypatch.setattr(sys, "argv", [*example_of(name), *more])
    with pytest.raises(SystemExit) as end:
        cli.main()
    found = capsys.readouterr()
    assert end.value.code == 0, found.err
    assert found.out
    return found.out


@pytest.mark.parametrize("name", first_fast(QUICK, 3))
def test_the_example_of_a_command_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    found = run_example(name, monkeypatch, capsys, "--json")
    assert faults_of(json.loads(found)) == ""


@pytest.fixture
def _of_a_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that examples name: a plan of a toy, the log of its run, measured runs."""
    answer_with(toy_graph((4,)), monkeypatch)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    question = Question(model="llama3-8b", num_gpus=4, seq_len=2048, global_batch=16)
    plan = check_layout(question, HandLayout(pp=2, zero=1)).plan
    save_plan(plan, "plan.yaml")
    steps = [{"step": i, "seconds": 1.2 * plan.estimate.step_s} for i in range(6)]
    Path("run.json").write_text(json.dumps({"steps": steps}))
    Path("runs.csv").write_text(f"{HEAD}\n{ROW}\n")


@pytest.mark.usefixtures("_of_a_toy")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in OF_FILES],
)
def test_the_example_of_a_command_on_files_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_json = name not in ("calibrate",)
    found = run_example(name, monkeypatch, capsys, *(["--json"] if with_json else []))
    if with_json:
        assert faults_of(json.loads(found)) == ""


@pytest.mark.slow  # runs models, and measures this machine
@pytest.mark.parametrize("name", RUNNING)
def test_the_example_of_a_command_that_runs_a_model_runs(
    name: str,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text((models / "tiny.py").read_text())
    question = Question(model="tiny.py", num_gpus=1, seq_len=64, global_batch=4)
    save_plan(check_layout(question, HandLayout()).plan, "plan.yaml")
    run_example(name, monkeypatch, capsys)


def test_every_example_runs() -> None:
    assert sorted((*QUICK, *OF_FILES, *RUNNING)) == sorted(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_the_example_and_is_not_cut(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(monkeypatch, capsys, name)
    assert text.endswith(f"\nExample:\n  {COMMANDS[name].epilog}\n")
    assert "..." not in re.sub(r"\{?files\}?\.\.\.", "", text)  # which may be repeated
    assert max(map(len, text.splitlines())) <= 80


def test_the_list_of_commands_is_not_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = " ".join(help_of(monkeypatch, capsys).split())
    assert "..." not in text.replace("[ARGS]...", "")
    for name, command in COMMANDS.items():
        first = " ".join(command.help.split("\n\n")[0].split())
        assert f"{name} {first}" in text


def test_options_stand_in_groups(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(monkeypatch, capsys, "check")
    titles = [line for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert titles == [
        "Arguments:",
        "Machines:",
        "Layout:",
        "What is trained, and by what:",
        "Files and output:",
        "Options:",
        "Example:",
    ]
    layout = text[text.index("Layout:") : text.index("What is trained")]
    assert all(f"--{word} " in layout for word in ("tp", "pp", "zero", "checkpoint", "layers"))
