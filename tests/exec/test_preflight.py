"""What is settled before any rank starts: where weights come from, and what is refused."""

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import zeros

from mist.errors import InputError
from mist.exec.run.preflight import preflight, say_finished
from mist.exec.run.run_options import RunOptions
from mist.plans.plan import Plan
from tests.exec.layouts import LLAMA, S, Variant, plan_of


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Of a folder with a configuration and weights."""
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "config.json").write_text(json.dumps(LLAMA))
    save_file({"a": zeros(3)}, hub / "model.safetensors")
    return plan_of(Variant(name="hub", model="hub", stages=(S(),)), tmp_path)


def options(**changes: object) -> RunOptions:
    return RunOptions(plan="plan.yaml", **changes)  # type: ignore[arg-type]


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"step-{step}"
    path.mkdir(parents=True)
    (path / "mist.json").write_text(json.dumps({"step": step, "fingerprint": "any", "seed": 7}))
    return path


def test_weights_lie_beside_the_config_unless_others_are_named(plan: Plan, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    save_file({"a": zeros(3)}, other / "model.safetensors")
    for asked, weights in (
        ({}, str(tmp_path / "hub")),
        ({"from_scratch": True}, None),
        ({"weights": str(other)}, str(other)),
    ):
        found = preflight(options(**asked), plan, leads=True).options
        assert (found.weights, found.from_scratch) == (weights, weights is None)


def test_a_checkpoint_to_go_on_from_comes_before_weights(plan: Plan, tmp_path: Path) -> None:
    folder = tmp_path / "ck"
    asked = options(checkpoint=str(folder), resume=True)
    found = preflight(asked, plan, leads=False)
    assert (found.last, found.options.weights) == (None, str(tmp_path / "hub"))
    path = checkpoint(folder, 3)
    found = preflight(asked, plan, leads=False)
    assert found.last is not None and found.last.path == path
    assert found.options.weights is None


def test_damaged_weights_are_refused_before_any_rank(plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "hub" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(InputError, match="cut short or damaged"):
        preflight(options(), plan, leads=True)
    assert preflight(options(from_scratch=True), plan, leads=True).options.weights is None


def test_a_used_folder_stays_locked_for_nobody(plan: Plan, tmp_path: Path) -> None:
    """A refusal gives the lock back, a run that goes on keeps it."""
    folder = tmp_path / "ck"
    checkpoint(folder, 3)
    asked = {"checkpoint": str(folder), "resume": True}
    with pytest.raises(InputError, match="was made with seed 7, this run has 8"):
        preflight(options(**asked, seed=8), plan, leads=True)
    assert preflight(options(**asked), plan, leads=True).lock_fds
    with pytest.raises(InputError, match="another run is writing into it"):
        preflight(options(**asked), plan, leads=True)


@pytest.mark.parametrize(("step", "finished"), [(8, False), (9, True), (12, True)])
def test_a_run_that_has_all_its_steps_says_so(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str], step: int, finished: bool
) -> None:
    path, log = checkpoint(tmp_path / "ck", step), tmp_path / "log.json"
    asked = options(checkpoint=str(tmp_path / "ck"), resume=True, steps=9, log=str(log))
    found = preflight(asked, plan, leads=True)
    assert found.finished is finished
    if finished:
        say_finished(found)
        words = f"already at step {step} of 9 ({path}): nothing to do\n"
        assert capsys.readouterr().out == words
        assert json.loads(log.read_text())["steps"] == []
