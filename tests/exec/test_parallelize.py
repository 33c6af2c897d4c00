"""The Python API, and the example that shows it, under torchrun."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.exec.forking import RunRanks
from tests.exec.layouts import S, Variant, write_models
from tests.exec.test_apply import ROOT, plan_file


@pytest.mark.slow
def test_parallelize_keeps_weights_and_refuses_other_plans(
    tmp_path: Path, forked: RunRanks
) -> None:
    write_models(tmp_path)
    variant = Variant(name="own", model="plain.py", stages=(S(zero=2, full=2),), micro=8)
    plan = plan_file(variant, tmp_path)
    forked("tests.exec.own_loop", plan, tmp_path / "plain.py", num_ranks=1)


@pytest.mark.slow
def test_the_example_trains_under_torchrun(tmp_path: Path) -> None:
    write_models(tmp_path)
    stages = (S(layers=(2,), zero=1), S(layers=(2,), zero=0))
    plan = plan_file(Variant(name="example", model="plain.py", stages=stages, micro=4), tmp_path)
    (tmp_path / "plain.py").rename(tmp_path / "my_transformer.py")
    script = tmp_path / "train_with_plan.py"
    script.write_text((ROOT / "examples" / "train_with_plan.py").read_text())
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [sys.executable, *torchrun, str(script), str(plan)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    losses = re.findall(r"step (\d): loss ([\d.]+), gradient norm [\d.]+", run.stdout)
    assert [int(number) for number, _ in losses] == [1, 2, 3, 4, 5]
    assert all(5.0 < float(loss) < 7.0 for _, loss in losses)  # about log(256)
