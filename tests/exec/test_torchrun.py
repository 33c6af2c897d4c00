"""`mist apply` as a rank of torchrun: as documented, and what a user sees when it cannot run."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.exec.layouts import S, Variant, write_models
from tests.exec.test_apply import LIMIT_S, ROOT, num_steps, plan_file, wait_for

TWO = Variant(name="plan", model="plain.py", stages=(S(dp=2, zero=2),), micro=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("torchrun")
    write_models(path)
    plan_file(TWO, path)
    return path


def documented() -> str:
    """The line of docs/apply.md."""
    text = (ROOT / "docs" / "apply.md").read_text()
    (line,) = re.findall(r"^    (torchrun .*mist apply .*)$", text, re.MULTILINE)
    return str(line)


def torchrun(line: str, folder: Path) -> subprocess.Popen[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        line.replace("torchrun ", "exec torchrun --standalone "),
        shell=True,
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_the_documented_line_runs(folder: Path) -> None:
    line = documented().replace("--nproc-per-node 8", "--nproc-per-node 2")
    run = torchrun(line, folder)
    _, errors = run.communicate(timeout=LIMIT_S)
    assert run.returncode == 0, errors
    assert num_steps(folder / "log.json") == 10


@pytest.mark.slow
def test_an_interrupt_of_torchrun_saves_first(folder: Path) -> None:
    line = "torchrun --no-python --nproc-per-node 2 -- mist apply plan.yaml --steps 100000"
    run = torchrun(f"{line} --log long.json --checkpoint ck", folder)
    wait_for(lambda: num_steps(folder / "long.json") >= 3)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=LIMIT_S)
    assert errors.count("mist: ended by SIGINT.") == 2
    done = len(json.loads((folder / "long.json").read_text())["steps"])
    assert f"saved ck/step-{done}\n" in errors
    assert (folder / "ck" / f"step-{done}" / "mist.json").exists()


def test_a_refusal_stands_in_the_report_of_torchrun(folder: Path) -> None:
    line = documented().replace("--nproc-per-node 8", "--nproc-per-node 1")
    run = torchrun(line, folder)
    _, errors = run.communicate(timeout=LIMIT_S)
    assert run.returncode == 1  # torchrun's own
    report = errors[errors.index("Root Cause") :]
    assert "exitcode  : 2 " in report
    words = "mist: the plan is for 2 ranks, but 1 were started. Start 2, or plan for --gpus 1."
    assert f"traceback : {words}" in report
