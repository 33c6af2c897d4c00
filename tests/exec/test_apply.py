"""`mist apply` as a user runs it: logs, refusals, SIGTERM, ranks and launchers that die."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mist.calibrate.logs import read_log
from mist.exec.build.batches import Batches
from mist.exec.build.empty_weights import load
from mist.plans.file import load_plan, save_plan
from mist.plans.plan import Plan
from mist.plans.workload import Attention
from mist.trace import TraceSetting, load_graph
from tests.exec.forking import Forked
from tests.exec.layouts import LLAMA, S, Variant, plan_of, write_models

COMMAND = [sys.executable, "-c", "from mist.cli import main; main()", "apply"]
ROOT = Path(__file__).parents[2]
LIMIT_S = 600.0

FAILING = """
import os
import torch.nn.functional as F
from plain import build_model

calls = []


def loss(output, batch):
    calls.append(1)
    if os.environ.get("RANK") == "1" and len(calls) > 3:
        raise ValueError("the third step of rank 1")
    return F.cross_entropy(output.float().flatten(0, 1), batch.flatten())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("apply")
    write_models(path)
    (path / "failing.py").write_text(FAILING)
    return path


def plan_file(variant: Variant, folder: Path) -> Path:
    """A plan that names its model as `mist plan` would."""
    plan = plan_of(variant, folder)
    workload = plan.workload
    setting = TraceSetting(precision=workload.precision, attention=workload.attention)
    facts = load_graph(plan.model.source, setting, progress=lambda message: None).facts
    known = replace(plan.model, fingerprint=facts.fingerprint, params=facts.num_params)
    path = folder / f"{variant.name}.yaml"
    save_plan(replace(plan, model=known), path)
    return path


def start(*arguments: object, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.1)


def num_steps(log: Path) -> int:
    return len(json.loads(log.read_text())["steps"]) if log.exists() else 0


def test_a_run_is_logged_and_ends_cleanly_when_asked(folder: Path) -> None:
    (folder / "data.txt").write_bytes(bytes(range(97, 123)) * 100)
    plan = plan_file(
        Variant(name="two", model="plain.py", stages=(S(dp=2, zero=2),), micro=8), folder
    )
    log = folder / "log.json"
    options = ("--steps", 10_000, "--data", "data.txt", "--lr", 3e-3, "--log", log)
    run = start(plan, *options, "--checkpoint", folder / "checkpoints", folder=folder)
    wait_for(lambda: num_steps(log) >= 5)
    run.send_signal(signal.SIGTERM)
    out, errors = run.communicate(timeout=LIMIT_S)
    assert run.returncode == 143, errors
    assert errors.endswith("mist: ended by SIGTERM.\n")
    assert out == ""
    found = json.loads(log.read_text())
    done = len(found["steps"])
    assert f"asked to stop after step {done}" in errors
    saved = {path.name for path in (folder / "checkpoints").iterdir()}
    assert saved == {f"step-{done}", ".lock"}
    assert [row["step"] for row in found["steps"]] == list(range(1, done + 1))
    assert found["steps"][-1]["loss"] < found["steps"][0]["loss"]  # the alphabet is learnt
    assert [row["step"] for row in found["steps"] if "measured" in row] == [2]
    assert {row["lr"] for row in found["steps"]} == {3e-3}
    assert all(0 < row["norm"] < 100 for row in found["steps"])
    assert "weights: drawn from seed 7\n" in errors
    assert found["stages"][0]["peak_bytes"] > 0
    assert read_log(log).step_s > 0
    parts = found["steps"][-1]["stages"][0]
    assert set(parts) == {"forward_s", "backward_s", "sums_s", "optimizer_s"}
    assert min(parts.values()) > 0
    # The mean of two ranks, of which the first timed the step: they do not begin at one instant.
    assert sum(parts.values()) <= 1.5 * found["steps"][-1]["seconds"]
    assert read_log(log).parts[0].backward_s > 0


@pytest.mark.slow  # test_launch.py names the cause in every order, without ranks that train
def test_the_traceback_of_the_rank_that_fails_is_shown_first(folder: Path) -> None:
    variant = Variant(name="failing", model="failing.py", stages=(S(dp=2, zero=3),))
    run = start(plan_file(variant, folder), "--steps", 50, "--timeout", 20, folder=folder)
    _, errors = run.communicate(timeout=LIMIT_S)
    assert run.returncode == 1
    message = errors[errors.index("mist: ") :]
    assert message.startswith("mist: rank 1 failed with exit code 1.\nTraceback")
    assert message.rstrip().endswith("ValueError: the third step of rank 1")


def test_a_plan_for_another_model_is_refused_before_any_rank(folder: Path) -> None:
    plan = plan_of(Variant(name="other", model="plain.py", stages=(S(dp=2),)), folder)
    wrong: Plan = replace(plan, model=replace(plan.model, params=5, fingerprint="sha256:other"))
    save_plan(wrong, folder / "other.yaml")
    run = start(folder / "other.yaml", folder=folder)
    _, errors = run.communicate(timeout=LIMIT_S)
    assert run.returncode == 2
    assert "model.fingerprint: the plan is for another model (5 parameters; " in errors
    assert "step" not in errors


@pytest.mark.slow
def test_weights_beside_a_config_are_where_a_run_starts(folder: Path, forked: Forked) -> None:
    """As a rank that somebody else has started."""
    hub, log = folder / "hub", folder / "hub.json"
    torch.manual_seed(11)
    fields = {name: value for name, value in LLAMA.items() if name != "model_type"}
    LlamaForCausalLM(LlamaConfig(**fields)).save_pretrained(hub)
    plan = plan_file(Variant(name="hub", model="hub", stages=(S(),), micro=8), folder)
    printed = forked("cli", "apply", plan, "--steps", 1, "--log", log, num_ranks=1)
    assert f"weights: read from {hub}\n" in printed
    loaded = load(str(hub), Attention.FLASH)
    batch = Batches(loaded, load_plan(plan).workload, 7).step(0)
    assert isinstance(batch, dict)
    own = LlamaForCausalLM.from_pretrained(hub)(**batch).loss.item()
    assert json.loads(log.read_text())["steps"][0]["loss"] == pytest.approx(own, abs=2e-6)


SLEEPING = """
import os, sys, time
from pathlib import Path
from mist.exec.build.process_group import process_group
with process_group(20.0):
    Path(sys.argv[1], os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(600)
"""


@pytest.mark.slow
def test_no_rank_outlives_its_launcher(tmp_path: Path) -> None:
    program = tmp_path / "sleeping.py"
    program.write_text(SLEEPING)
    arguments = [str(program), str(tmp_path)]
    code = f"from mist.exec.run.launch import run_ranks; run_ranks({arguments!r}, 2)"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    launcher = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **environment})
    files = [tmp_path / "0", tmp_path / "1"]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(alive(int(file.read_text())) for file in files))
    assert [*temporary.glob("mist-*")] == []


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or ") Z " not in stat.read_text()
