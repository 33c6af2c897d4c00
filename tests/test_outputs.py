"""Outputs are refused before the work starts: endings, places, inputs, files of another kind."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mist.cli import outputs
from mist.cli.outputs import OutputKind, check_output
from mist.errors import OutputError
from mist.plans.file import dump_plan, save_plan
from tests.sample_plans import sample_plan
from tests.test_cli import SMALL, Mist, mist

__all__ = ["mist"]  # a fixture: it runs a command in an empty folder, which is the current one

KINDS = {name: kind for name, kind in vars(outputs).items() if isinstance(kind, OutputKind)}

# A command with an output, whose inputs are there and whose work would fail: there is no model.
COMMANDS = [
    ("plan", "gone.py", *SMALL, "--out"),
    ("check", "gone.py", *SMALL, "--out"),
    ("check", "plan.yaml", "--out"),
    ("verify", "plan.yaml", "--timeline"),
    ("apply", "plan.yaml", "--log"),
    ("calibrate", "plan.yaml", "log.json", "--out"),
    ("validate", "runs.csv", "--out"),
    ("trace", "gone.py", "--graph"),
]
ENDINGS = {"--timeline": ".png", "--log": ".json", "--graph": ".svg"}


def ending(command: tuple[str, ...]) -> str:
    return ".csv" if command[0] == "validate" else ENDINGS.get(command[-1], ".yaml")


@pytest.fixture
def inputs(tmp_path: Path) -> None:
    plan = sample_plan()
    save_plan(replace(plan, model=replace(plan.model, source="gone.py")), tmp_path / "plan.yaml")
    (tmp_path / "log.json").write_text(json.dumps({"steps": [{"step": 1, "seconds": 1.0}] * 3}))
    (tmp_path / "runs.csv").write_text("run_id\n")


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.name, path.read_bytes()


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_place_is_refused_before_the_work(
    mist: Mist, tmp_path: Path, command: tuple[str, ...]
) -> None:
    option, end = command[-1], ending(command)
    (tmp_path / f"mine{end}").write_bytes(b"my own work\n" * 1000)
    before = list(contents(tmp_path))
    cases = {
        "out.exe": f"{option} out.exe: ",
        f"no/out{end}": f"{option} no/out{end}: the folder no does not exist. Create it first.",
        f"plan.yaml/o{end}": f"{option} plan.yaml/o{end}: plan.yaml is not a folder.",
        f"mine{end}": f"{option} mine{end} exists and is no ",
        f"{'n' * 300}{end}": f"{option} {'n' * 300}{end}: File name too long.",
    }
    for place, words in cases.items():
        run = mist(*command, place)
        assert (run.code, run.out) == (2, "")
        assert run.message.startswith(words)
        assert list(contents(tmp_path)) == before


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize(
    "command",
    [
        ("check", "plan.yaml", "--out", "./plan.yaml"),
        ("calibrate", "plan.yaml", "log.json", "--out", "plan.yaml", "--force"),
        ("validate", "runs.csv", "--out", "runs.csv", "--force"),
        ("apply", "plan.yaml", "model.json", "--log", "model.json", "--force"),
        ("apply", "plan.yaml", "--data", "tokens.json", "--log", "link.json", "--force"),
    ],
    ids=" ".join,
)
def test_an_input_is_never_written(mist: Mist, tmp_path: Path, command: tuple[str, ...]) -> None:
    for name in ("model.json", "tokens.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "link.json").symlink_to("tokens.json")
    before = list(contents(tmp_path))
    run = mist(*command)
    assert run.code == 2
    assert "is an input of this command. Choose another file." in run.message
    assert list(contents(tmp_path)) == before


@pytest.mark.usefixtures("inputs")
def test_a_log_is_no_plan(mist: Mist, tmp_path: Path) -> None:
    """It took the place of the plan, and the command ended with 0."""
    plan = (tmp_path / "plan.yaml").read_bytes()
    run = mist("apply", "plan.yaml", "--log", "plan.yaml")
    assert (run.code, run.message) == (2, "--log plan.yaml: a log ends in .json.")
    assert (tmp_path / "plan.yaml").read_bytes() == plan


@pytest.mark.slow
def test_a_picture_of_the_user_is_not_lost(mist: Mist, models: Path, tmp_path: Path) -> None:
    (tmp_path / "o.png").write_bytes(b"\x89PNG of a holiday")
    asked = ("plan", models / "tiny.py", *SMALL, "--space", "3d", "--out", "o.yaml")
    run = mist(*asked)
    assert run.message == (
        "--out o.png exists and is no picture of Mist. Choose another file, or --force to "
        "replace it."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["o.png"]
    assert mist(*asked, "--force").code == 0
    assert mist(*asked).code == 0  # its own plan and picture are planned again


def test_files_of_the_same_kind_are_known(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(dump_plan(sample_plan()))
    check_output("--out", path, KINDS["PLAN_FILE"])
    with pytest.raises(OutputError, match="exists and is no calibration"):
        check_output("--out", path, KINDS["CALIBRATION_FILE"])
    check_output("--out", path, KINDS["CALIBRATION_FILE"], force=True)


def test_an_empty_file_is_nobodys_work(tmp_path: Path) -> None:
    """As `mktemp` makes them."""
    for name, kind in KINDS.items():
        path = tmp_path / f"{name}{kind.endings[0]}"
        path.write_text("\n")
        check_output("--out", path, kind)


def test_a_pipe_is_no_place_for_a_file(tmp_path: Path) -> None:
    """To open it would wait for a reader, for ever."""
    for name, kind in KINDS.items():
        path = tmp_path / f"{name}{kind.endings[0]}"
        os.mkfifo(path)
        with pytest.raises(OutputError) as refused:
            check_output("--out", path, kind, force=True)
        words = f"--out {path} is a pipe, socket or device. Choose another file."
        assert str(refused.value) == words
