"""The check of a GPU runs on a CPU too, all its parts, so that it cannot rot between two cards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mist.plans.memory_levels import USUAL
from mist.plans.workload import HeadMode, MemoryLevel

ROOT = Path(__file__).parents[1]
PARTS = ("versions", "parity", "profile", "predictions", "overlap", "levels", "sustained")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_part_runs_with_what_the_bundle_holds(tmp_path: Path) -> None:
    absent = tmp_path / "absent"  # what the bundle leaves out, as it is only for pictures
    absent.mkdir()
    (absent / "matplotlib.py").write_text("raise ImportError('not in the bundle')\n")
    command = [sys.executable, "benchmarks/gpu_check.py", "--device", "cpu", "--tiny"]
    run = subprocess.run(
        [*command, "--out", str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(absent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads((tmp_path / "out/gpu_check.json").read_text())
    for part in PARTS:
        assert "error" not in found[part], found[part]
    assert len(found["predictions"]["found"]) == 6
    levels = found["levels"]["found"]["rows"]
    usual = {level.value for level in USUAL}
    heads = {f"head {mode}" for mode in HeadMode if mode is not HeadMode.NONE}
    assert set(levels) == {level.value for level in MemoryLevel} - usual | heads
    assert ("parity", "PASS") in [tuple(row[:2]) for row in found["verdicts"]]
