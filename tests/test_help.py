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
from tests.report.json_faults import faults_of

ROOT = Path(__file__).parents[1]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
# Those that end within seconds and read what a checkout has.
QUICK = ("check", "convert", "plan", "profiles", "trace")


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


@pytest.mark.parametrize("name", QUICK)
def test_the_example_of_a_command_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", example_of(name))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0, capsys.readouterr().err
    assert capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*example_of(name), "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    assert faults_of(json.loads(capsys.readouterr().out)) == ""


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
