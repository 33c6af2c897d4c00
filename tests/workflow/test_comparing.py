"""`mist compare`: a plan beside a log written by hand, and logs that cannot be used."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mist.calibrate.run_comparison import RunComparison
from mist.cli.application import app
from mist.errors import InputError
from mist.plans.file import save_plan
from mist.units import GIB
from mist.workflow.comparing import compare
from tests.sample_plans import sample_plan

# Warm-up, a watched step (slower), and three that count: median 4.0 s.
SECONDS = (9.0, 8.0, 7.0, 4.0, 3.0, 5.0)
WATCHED = 2
COLLECTIVE = {"axis": "dp", "kind": "all_gather", "count": 9, "bytes": 2048}


def log_of(**changes: object) -> dict[str, object]:
    steps = [
        {"step": i, "seconds": s, **({"measured": True} if i == WATCHED else {})}
        for i, s in enumerate(SECONDS)
    ]
    stages = [
        {"peak_bytes": 32 * GIB, "collectives": [COLLECTIVE]},
        {"peak_bytes": 50 * GIB, "collectives": []},
    ]
    return {"steps": steps, "stages": stages, **changes}


def written(folder: Path, log: object) -> tuple[Path, Path]:
    plan, path = folder / "plan.yaml", folder / "log.json"
    save_plan(sample_plan(), plan)
    path.write_text(log if isinstance(log, str) else json.dumps(log))
    return plan, path


def found_of(folder: Path, **changes: object) -> RunComparison:
    return compare(*written(folder, log_of(**changes)))


def test_each_figure_stands_beside_its_measurement(tmp_path: Path) -> None:
    step, throughput, first, second = found_of(tmp_path).rows
    # The plan says 5.0 s +-25 %, and 65536 tokens a step at 5 s are 13107 tokens/s.
    assert (step.predicted, step.measured, step.error_ratio) == (5.0, 4.0, 0.25)
    assert step.is_within
    assert throughput.measured == 32 * 2048 / 4.0
    # Peaks of 40 and 48 GiB, +-10 %: 32 is outside of 40 +-4, 50 inside of 48 +-4.8.
    assert (first.predicted, first.measured) == (40 * GIB, 32 * GIB)
    assert (first.is_within, second.is_within) == (False, True)


def test_half_of_the_middle_half_of_the_steps_is_their_spread(tmp_path: Path) -> None:
    # 3, 4, 5: quartiles 3.5 and 4.5; half of 1.0 over 4.0.
    assert found_of(tmp_path).rows[0].spread_ratio == 0.125


def test_what_the_allocator_adds_is_left_out(tmp_path: Path) -> None:
    plan, log = written(tmp_path, log_of())
    text = plan.read_text().replace(f"activations: {10 * GIB}", f"allocator: {10 * GIB}")
    plan.write_text(text)
    assert compare(plan, log).rows[2].predicted == 30 * GIB


def test_a_log_of_seconds_alone_compares_the_time(tmp_path: Path) -> None:
    found = found_of(tmp_path, stages=[])
    assert [row.what for row in found.rows] == ["step", "throughput"]


def test_the_step_of_a_stage_in_two(tmp_path: Path) -> None:
    """Of three steps that count the medians; predicted 8 micro-batches and their delta."""
    log = log_of()
    for number, step in enumerate(log["steps"]):  # type: ignore[arg-type, var-annotated]
        passes = {"forward_s": 1.0, "backward_s": 1.0 + number, "sums_s": 0.125}
        step["stages"] = [{**passes, "optimizer_s": 0.5}, {**passes, "optimizer_s": 0.25}]
    first, second = compare(*written(tmp_path, log)).stages
    assert first.predicted_work_s == 8 * 0.5 + 0.25
    assert first.predicted_rest_s == 5.0 - 4.25
    assert (first.parts.backward_s, first.work_s) == (5.0, 6.5)  # of 4, 5, 6: the fourth to sixth
    assert first.rest_s == 4.0 - 6.5
    assert second.work_s == 6.25
    shown = CliRunner().invoke(app, ["compare", *map(str, written(tmp_path, log))])
    for words in ("at work", "transfers, sums, waiting", "4.25 s", "6.50 s"):
        assert words in shown.output


def test_the_command_prints_and_gives_json(tmp_path: Path) -> None:
    plan, log = written(tmp_path, log_of())
    shown = CliRunner().invoke(app, ["compare", str(plan), str(log)])
    assert shown.exit_code == 0, shown.output
    for words in (
        "5.00 s",
        "4.00 s +-12.5%",
        "+25.0%",
        "40.0 GiB",
        "all_gather",
        "no (-10% to +10%)",
    ):
        assert words in shown.output
    told = CliRunner().invoke(app, ["compare", str(plan), str(log), "--json"])
    data = json.loads(told.stdout)
    assert data["figures"][0]["error_ratio"] == 0.25
    assert data["stages"][0]["collectives"][0] == {
        "axis": "dp", "kind": "all_gather", "count": 9, "num_bytes": 2048,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (
            '{"seconds": [1.0]}',
            '{log} is no log of a run: expected {{"steps": [{{"seconds": 1.5}}, ...]}} as JSON, '
            "a Trainer's state, a table with a column step_time_s, or the text of torchtitan, "
            "Megatron-LM or nanotron.",
        ),
        ({"steps": []}, "{log} has no steps with seconds above 0."),
        (
            log_of(stages=[{"peak_bytes": 1}]),
            "{log} has 1 stages, but {plan} has 2: it is the log of another plan. "
            "Give the log of this one (mist apply PLAN --log FILE).",
        ),
    ],
)
def test_what_is_no_log_of_the_plan_is_refused(log: object, message: str, tmp_path: Path) -> None:
    plan, path = written(tmp_path, log)
    with pytest.raises(InputError) as refused:
        compare(plan, path)
    assert str(refused.value) == message.format(log=path, plan=plan)
    assert refused.value.exit_code == 2
