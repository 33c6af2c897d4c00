"""A plan that somebody else wrote: its model runs where the user lets it, and nothing else does."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import mist as api
from mist.errors import InputError
from mist.plans.file import save_plan
from mist.workflow.plan_model import TRUSTED, ModelAccess, model_of
from tests.sample_plans import sample_plan
from tests.security.canary import statement, went_off
from tests.test_cli import Mist, mist

__all__ = ["mist"]  # a fixture: it runs a command in an empty folder, which is the current one


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def model_file(path: Path, canary: Path) -> Path:
    """A model that shows that it ran, and is none."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(statement(canary))
    return path


def plan_of(source: object, path: Path) -> Path:
    plan = sample_plan()
    save_plan(replace(plan, model=replace(plan.model, source=str(source))), path)
    return path


@pytest.fixture
def elsewhere(tmp_path_factory: pytest.TempPathFactory, canary: Path) -> Path:
    """A model outside the current folder."""
    return model_file(tmp_path_factory.mktemp("elsewhere") / "model.py", canary)


@pytest.mark.parametrize("command", ["check", "verify", "apply"])
def test_a_model_elsewhere_does_not_run(
    mist: Mist, tmp_path: Path, elsewhere: Path, canary: Path, command: str
) -> None:
    plan_of(elsewhere, tmp_path / "plan.yaml")
    run = mist(command, "plan.yaml")
    assert (run.code, run.out) == (2, "")
    assert run.message == (
        f"plan.yaml names the model {elsewhere}, a Python file outside the current folder, which "
        "would run. Give the model itself behind the plan, or --trust where you trust who wrote "
        "the plan."
    )
    assert not went_off(canary)


def test_neither_does_it_for_a_calibration(
    mist: Mist, tmp_path: Path, elsewhere: Path, canary: Path
) -> None:
    plan_of(elsewhere, tmp_path / "plan.yaml")
    (tmp_path / "log.json").write_text(json.dumps({"steps": [{"step": 1, "seconds": 1.0}] * 3}))
    run = mist("calibrate", "plan.yaml", "log.json", "--out", "fitted.yaml")
    assert "outside the current folder, which would run" in run.message
    assert not went_off(canary)


def test_neither_does_it_in_python(tmp_path: Path, elsewhere: Path, canary: Path) -> None:
    plan_of(elsewhere, tmp_path / "plan.yaml")
    with pytest.raises(InputError, match="outside the current folder"):
        api.check(tmp_path / "plan.yaml")
    assert not went_off(canary)


def test_a_link_that_leads_out_does_not_run(
    mist: Mist, tmp_path: Path, elsewhere: Path, canary: Path
) -> None:
    (tmp_path / "model.py").symlink_to(elsewhere)
    plan_of("model.py", tmp_path / "plan.yaml")
    assert "outside the current folder" in mist("check", "plan.yaml").message
    assert not went_off(canary)


def test_a_fingerprint_lets_nothing_run(tmp_path: Path, elsewhere: Path) -> None:
    """Whoever writes the plan writes it."""
    plan = api.load_plan(plan_of(elsewhere, tmp_path / "plan.yaml"))
    assert plan.model.fingerprint
    with pytest.raises(InputError, match="outside the current folder"):
        model_of(plan, tmp_path / "plan.yaml")


@pytest.mark.parametrize(
    "how", ["here", "below", "beside the plan", "trusted", "on the command line"]
)
def test_a_model_runs_where_the_user_lets_it(
    mist: Mist, tmp_path: Path, elsewhere: Path, canary: Path, how: str
) -> None:
    sources = {"here": "model.py", "below": "sub/model.py", "beside the plan": "model.py"}
    folders = {"below": "sub", "beside the plan": "got"}
    if how in sources:
        model_file(tmp_path / folders.get(how, ".") / "model.py", canary)
    path = "got/plan.yaml" if how == "beside the plan" else "plan.yaml"
    plan_of(sources.get(how, elsewhere), tmp_path / path)
    more = {"trusted": ["--trust"], "on the command line": [str(elsewhere)]}
    run = mist("check", path, *more.get(how, []))
    assert went_off(canary)
    assert "defines neither build_model() nor model" in run.message
    source = "got/model.py" if how == "beside the plan" else sources.get(how, elsewhere)
    line = f"{path} names the model {source}, a Python file that runs here\n"
    assert (line in run.err) is (how != "on the command line")


def test_a_configuration_is_data_wherever_it_lies(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    plan = api.load_plan(plan_of(tmp_path / "config.json", tmp_path / "plan.yaml"))
    assert model_of(plan, tmp_path / "plan.yaml") == str(tmp_path / "config.json")
    preset = replace(plan, model=replace(plan.model, source="llama3-8b"))
    assert model_of(preset, tmp_path / "plan.yaml") == "llama3-8b"


def test_the_model_of_the_user_is_the_one_that_is_taken(tmp_path: Path, elsewhere: Path) -> None:
    plan = api.load_plan(plan_of(elsewhere, tmp_path / "plan.yaml"))
    assert model_of(plan, tmp_path / "plan.yaml", ModelAccess(model="own.py")) == "own.py"
    assert model_of(plan, tmp_path / "plan.yaml", TRUSTED) == str(elsewhere)


TAGS = ("!!python/object/apply:os.system ['touch {canary}']", "!!python/name:os.system")


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("kind", ["plan", "profile"])
def test_yaml_makes_no_objects(
    mist: Mist, tmp_path: Path, canary: Path, kind: str, tag: str
) -> None:
    assert yaml.unsafe_load(TAGS[0].format(canary=canary)) == 0
    assert went_off(canary), "the tag is none that runs"
    canary.unlink()
    (tmp_path / "file.yaml").write_text(f"schema: {tag.format(canary=canary)}\n")
    if kind == "plan":
        run = mist("check", "file.yaml")
    else:
        run = mist("check", "gpt2", "--gpus", 1, "--cluster", "./file.yaml")
    assert run.code == 2
    assert not went_off(canary)


EVIL_NAME = "evil\x1b[2J\x9b\x07\u202e\r\nmist: all is well"


def test_control_characters_of_a_plan_are_shown_escaped(mist: Mist, tmp_path: Path) -> None:
    plan = sample_plan()
    plan = replace(
        plan,
        model=replace(plan.model, name=EVIL_NAME, source="gone.py"),
        cluster=replace(plan.cluster, name=EVIL_NAME),
    )
    save_plan(plan, tmp_path / "plan.yaml")
    (tmp_path / "log.json").write_text(json.dumps({"steps": [{"step": 1, "seconds": 1.0}] * 3}))
    for run in (mist("check", "plan.yaml"), mist("compare", "plan.yaml", "log.json")):
        shown = run.out + run.err
        assert "\\x1b[2J" in shown
        assert not any(control in shown for control in "\x1b\x9b\x07\u202e\r")
