"""`mist calibrate` on toy runs that another constant made: it is found, written and used."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mist.cli.application import app
from mist.cli.hand_layouts import run_by_hand
from mist.errors import InputError
from mist.plans.file import save_plan
from mist.plans.search_space import NO_RATIOS, SearchSpace
from mist.plans.workload import ScheduleKind
from mist.platform import Kind, load_platform
from mist.symbolic.compile import compile_model
from mist.symbolic.estimate import estimate
from mist.symbolic.job import make_job
from mist.workflow.calibrating import calibrate
from mist.workflow.planning import make_plan
from mist.workflow.request import Question
from tests.toys import adamw_setting, toy_graph
from tests.workflow.answering import answer_with

GRAPH = toy_graph((8,), hidden=8192)
PLAIN = {"offload": NO_RATIOS, "schedules": (ScheduleKind.ONE_F_ONE_B,)}
SLOWER, LONGER = 1.45, 2.5e-3  # a deviation or so from what is known beforehand


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answer_with(GRAPH, monkeypatch)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)  # where the models of the plans may run


def measured(folder: Path, name: str, num_gpus: int, **space: tuple[int, ...]) -> tuple[Path, Path]:
    """A plan, and the log of a run on a machine that is slower than the profiles say."""
    (folder / "toy.py").write_text("")
    question = Question(
        model=str(folder / "toy.py"), num_gpus=num_gpus, seq_len=1024, global_batch=64
    )
    plan = make_plan(question, SearchSpace(**PLAIN, **space)).plan
    plan_path, log_path = folder / f"{name}.yaml", folder / f"{name}.json"
    save_plan(plan, plan_path)
    platform = load_platform(num_gpus=num_gpus, gpu=None, cluster=None, runtime="torch")
    scale = replace(platform.device.tensor_time_scale, value=SLOWER)
    launch = replace(platform.runtime.host.layer_launch_s, value=LONGER)
    runtime = replace(platform.runtime, host=replace(platform.runtime.host, layer_launch_s=launch))
    machine = replace(
        platform, device=replace(platform.device, tensor_time_scale=scale), runtime=runtime
    )
    job = make_job(compile_model(GRAPH, adamw_setting(runtime)), machine, plan.workload)
    seconds = estimate(job, plan.layout).step_s
    steps = [{"step": i, "seconds": seconds * (3 if i < 2 else 1)} for i in range(6)]
    log_path.write_text(json.dumps({"steps": steps}))
    return plan_path, log_path


def pairs(folder: Path) -> list[tuple[Path, Path]]:
    return [
        measured(folder, "a", 8, tp=(1,), micro_batch=(4,)),
        measured(folder, "b", 8, tp=(2,), micro_batch=(2,)),
        measured(folder, "c", 16, pp=(2,), micro_batch=(1,)),
        measured(folder, "d", 16, pp=(1,), tp=(1,), micro_batch=(1,)),
    ]


@pytest.mark.slow  # four plans
def test_what_made_the_runs_is_found(tmp_path: Path) -> None:
    found = calibrate(pairs(tmp_path), lambda message: None)
    assert max(map(abs, found.errors_after)) < 0.03 < max(map(abs, found.errors_before))
    before, after = found.before, found.after
    # Runs of one node and of two, with and without tp, that know nothing of hops.
    speed = "device.tensor_time_scale"
    assert abs(np.log(after[speed] / SLOWER)) < abs(np.log(before[speed] / SLOWER))
    known = load_platform(num_gpus=8, gpu=None, cluster=None, runtime="torch").calibration
    assert known is not None
    # Its rate is surer than it was. That few runs agree says nothing of what no constant explains.
    assert found.calibration.covariance[0][0] < known.covariance[0][0]
    assert found.calibration.rest_deviation == known.rest_deviation


@pytest.mark.slow  # a plan, and fifty predictions of it
def test_one_run_moves_what_it_speaks_of(tmp_path: Path) -> None:
    pair = measured(tmp_path, "a", 8, tp=(1,), micro_batch=(4,))
    found = calibrate([pair], lambda message: None)
    assert abs(found.errors_after[0]) < abs(found.errors_before[0]) / 2
    tensor = "runtime.overlap.tensor_parallel_time_scale"
    assert found.after[tensor] == pytest.approx(found.before[tensor], rel=0.02)
    assert [tensor in lesson for lesson in found.lessons].count(True) == 1


def test_a_layout_in_the_words_of_check_needs_no_plan(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text("")
    log = tmp_path / "log.txt"
    log.write_text("elapsed time per iteration (ms): 700.0\n" * 4)
    words = f"{tmp_path}/toy.py --gpus 8 --zero 3 --micro-batch 2 --seq 1024 --global-batch 64"
    run = run_by_hand(words)
    assert (run.question.num_gpus, run.layout.zero, run.layout.micro_batch) == (8, 3, 2)
    found = calibrate([(run, log)], lambda message: None)
    assert abs(found.errors_after[0]) <= abs(found.errors_before[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("toy.py --zero 3", "a model needs --gpus"),
        ("toy.py --gpus 8 --bogus", "No such option"),
        ("toy.py --gpus 8 --zero '3", "No closing quotation"),
    ],
)
def test_words_that_are_no_layout_are_refused(words: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_by_hand(words)


@pytest.mark.slow
def test_runs_of_two_devices_do_not_mix(tmp_path: Path) -> None:
    plan, log = measured(tmp_path, "a", 8, tp=(1,), micro_batch=(4,))
    other = tmp_path / "other.yaml"
    other.write_text(plan.read_text().replace("h100-sxm", "h200").replace("dgx-h100", "dgx-h200"))
    with pytest.raises(InputError, match="Calibrate each by itself"):
        calibrate([(plan, log), (other, log)], lambda message: None)


@pytest.mark.slow  # four plans, and one with what they say
def test_plans_use_what_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(path) for pair in pairs(tmp_path) for path in pair]
    app(["calibrate", *files], standalone_mode=False)
    assert "device.tensor_time_scale" in capsys.readouterr().out
    platform = load_platform(num_gpus=8, gpu=None, cluster=None, runtime="torch")
    assert platform.calibration is not None
    assert platform.device.tensor_time_scale.kind is Kind.CALIBRATED
    question = Question(model=str(tmp_path / "toy.py"), num_gpus=8, seq_len=1024)
    assert make_plan(question, SearchSpace(**PLAIN)).plan.estimate.uncertainty.calibrated


def test_pairs_are_pairs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="takes pairs"):
        app(["calibrate", "plan.yaml"], standalone_mode=False)
    with pytest.raises(Exception, match="is written as"):
        app(["calibrate", "p.yaml", "l.json", "--out", "x.txt"], standalone_mode=False)
