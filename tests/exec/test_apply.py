"""`mist apply` through the command line: trains, logs, and goes on under another plan."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mist.planfile import save_plan
from mist.plans import Plan
from mist.spec import Precision, ScheduleKind
from tests.exec.layouts import S, Variant, plan_of, write_models

PLANS = {
    "data": Variant(name="data", stages=(S(dp=2, zero=3),), micro=4),
    "pipeline": Variant(name="pipeline", stages=(S(layers=(1,)), S(layers=(3,))), micro=4),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_models(tmp_path)
    for name, variant in PLANS.items():
        save_plan(of_model(plan_of(variant, tmp_path), tmp_path), tmp_path / f"{name}.yaml")
    return tmp_path


def of_model(plan: Plan, folder: Path) -> Plan:
    """The plan with the facts of the model that it names, in fp32."""
    from mist.trace import Setting, load_graph

    setting = Setting(precision=Precision.FP32, attention=plan.workload.attention)
    graph = load_graph(plan.model.source, setting, progress=lambda _: None)
    model = replace(
        plan.model, params=graph.num_params, fingerprint=graph.fingerprint, name=graph.name
    )
    return replace(plan, model=model)


def apply(folder: Path, plan: str, *options: str) -> subprocess.CompletedProcess[str]:
    mist = str(Path(sys.executable).with_name("mist"))
    command = [mist, "apply", f"{plan}.yaml", *options]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=150, check=False
    )


def losses(folder: Path, name: str) -> list[float]:
    return [step["loss"] for step in json.loads((folder / name).read_text())["steps"]]


@pytest.mark.timeout(400)
def test_training_goes_on_under_another_plan(folder: Path) -> None:
    whole = apply(folder, "data", "--steps", "4", "--log", "whole.json")
    assert whole.returncode == 0, whole.stderr
    first = apply(folder, "data", "--steps", "2", "--checkpoint", "kept", "--log", "first.json")
    assert first.returncode == 0, first.stderr
    rest = apply(
        folder, "pipeline", "--steps", "4", "--checkpoint", "kept", "--resume", "--log", "rest.json"
    )
    assert rest.returncode == 0, rest.stderr
    log = json.loads((folder / "whole.json").read_text())
    assert all(step["seconds"] > 0 and step["tokens_per_s"] > 0 for step in log["steps"])
    assert all(stage["peak_bytes"] > 0 for stage in log["stages"])
    joined = losses(folder, "first.json") + losses(folder, "rest.json")
    assert joined == pytest.approx(losses(folder, "whole.json"), abs=2e-5)


@pytest.mark.timeout(200)
def test_what_cannot_be_run_is_refused_before_any_rank_starts(folder: Path) -> None:
    plan = of_model(plan_of(PLANS["pipeline"], folder), folder)
    schedule = replace(plan.schedule, kind=ScheduleKind.ZERO_BUBBLE)
    stages = tuple(replace(stage, zero=3) for stage in plan.stages)
    save_plan(replace(plan, schedule=schedule, stages=stages), folder / "bad.yaml")
    run = apply(folder, "bad")
    assert run.returncode == 2
    assert "stages[0].zero: zero-bubble splits the backward pass" in run.stderr
    assert "Traceback" not in run.stderr
    other = replace(plan, model=replace(plan.model, fingerprint="sha256:other"))
    save_plan(other, folder / "other.yaml")
    run = apply(folder, "other")
    assert run.returncode == 2
    assert "fingerprint" in run.stderr
