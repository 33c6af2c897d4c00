"""What fits on one screen: the verdict, each figure that it rests on, and never a line too many."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest

from mist.plans.file import load_plan
from mist.plans.host_memory import HostNeed
from mist.plans.plan import Alternative, Offload, Plan, Regret, Robustness, Schedule
from mist.plans.workload import MemoryLevel, ScheduleKind
from mist.report.plan_screen import MOST_LINES, Sheet, print_sheet, screen_lines
from mist.report.plan_tables import check_json
from mist.units import GIB
from tests.sample_plans import (
    HOST,
    LIMITS,
    estimate_of,
    host_need,
    sample_plan,
    stage_estimate,
    stage_plan,
)

PLANS = Path(__file__).parents[2] / "plans"


@pytest.fixture(autouse=True)
def _width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


def lines_of(plan: Plan, host: HostNeed = HOST, **more: Sequence[str]) -> list[str]:
    return screen_lines(Sheet(plan=plan, limits=LIMITS, host=host, **more))  # type: ignore[arg-type]


# Bars by hand: of 72 GiB in 33 columns, 30 end at 14 and 48 at 22; 64 lie at 29. Of a step of 5 s
# in 98 columns, 3 s end at 59, 4 s at 78, 4.25 s at 83.
SCREEN = f"""\
FITS, with 16.0 GiB to spare (peak +-10%, P(fits) 99%). The upper end, 52.8 GiB, fits too.
Predicted: 5.00 s per step (3.75 s to 6.25 s, not calibrated), 13.1 K tokens/s, MFU 43.2%.
toy: 8.03 B parameters on 8 x h100-sxm (dgx-h100), runtime torch
sequence 2048, global batch 32 in 8 micro-batches (mb), bf16, adamw, attention flash, schedule 1f1b
Stage  Layers  GPUs  dp  tp    zero  mb  Recomputed  On the host
0-1    8 each  0-7   2   2+sp  1     2   1 full      nothing
Memory per GPU: a plan may use 64.0 GiB (|), the usable 72.0 GiB (]) less a margin of 11%; S states,
  A activations, W working, O other
0-1  [{"S" * 14}{"A" * 8}{"." * 7}|{"." * 4}]  48.0 GiB  S 30.0 GiB, A 18.0 GiB, W 0 B, O 0 B
Where the step goes:
[{"C" * 59}{"T" * 19}{"O" * 5}{"P" * 15}]
C compute 3.00 s (60.0%), T tensor-parallel 1.00 s (20.0%), O once per step 250 ms (5.0%),
P pipeline bubble 750 ms (15.0%)
Other layouts  step           why not
pp1 dp8 tp1    6.00 s +20.0%  +1.00 s tensor-parallel
pp1 dp8 tp1 ties if tensor-parallel collectives took 50.0 % less in both.
Note: no list of layers.
Note: all-gathers of 9.0 GiB are far out.
More: --details (all parts, op costs with their sources, what is not modelled).
Wrote p.yaml and p.png.
"""


def test_the_screen_of_a_plan_whole() -> None:
    found = lines_of(sample_plan(), notes=["no list of layers"], files=["p.yaml", "p.png"])
    assert found == SCREEN.splitlines()


def test_details_follow_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    sheet = Sheet(plan=sample_plan(), limits=LIMITS, host=HOST)
    print_sheet(sheet, details=False)
    short = capsys.readouterr().out
    assert short.splitlines() == screen_lines(sheet)
    print_sheet(sheet, details=True)
    whole = capsys.readouterr().out
    assert whole.startswith(short)
    assert "Op costs" in whole.removeprefix(short)


def test_stages_that_differ_have_a_line_each() -> None:
    levels = {MemoryLevel.NONE: 4, MemoryLevel.SELECTIVE: 3, MemoryLevel.FULL: 1}
    offload = Offload(weights=0.5, grads=0.5, activations=0.375)
    plan = sample_plan(
        schedule=Schedule(kind=ScheduleKind.INTERLEAVED, vpp=2),
        stages=(
            stage_plan(layers=((0, 4), (8, 4)), memory=levels, offload=offload),
            stage_plan(layers=((4, 4), (12, 4)), device=4),
        ),
    )
    found = lines_of(plan, host_need(200))
    start = found.index(
        "Stage  Layers     GPUs  dp  tp    zero  mb  Recomputed           On the host"
    )
    assert found[start + 1 : start + 3] == [
        "0      0-3,8-11   0-3   2   2+sp  1     2   3 selective, 1 full  "
        "weights, grads 50%, activations 38%",
        "1      4-7,12-15  4-7   2   2+sp  1     2   1 full               nothing",
    ]
    assert "schedule interleaved, 2 chunks per stage" in " ".join(" ".join(found).split())
    assert (
        "Host memory: 200.0 GiB per node of 320.0 GiB (guess; give yours with --host-memory)."
        in found
    )


def test_a_plan_of_one_stage_names_no_schedule_and_no_host_memory() -> None:
    one = stage_plan(devices=(0, 8), dp=4, micro_batch=1, dp_replicate=2)
    text = "\n".join(lines_of(sample_plan(stages=(one,), estimate=estimate_of(stage_estimate()))))
    assert "schedule" not in text
    assert "Host memory" not in text
    assert "\n0      0-7     0-7   2x2  2+sp  1     1   1 full      nothing\n" in text


def test_robustness_is_shortened() -> None:
    layout = "pp1 dp8 tp1 zero2 mb1 x8, 3 of 16 layers recomputed, offloaded: weights 50 %"
    robust = Robustness(
        num_draws=10,
        tolerance_ratio=0.03,
        median_step_s=5.1,
        worst_step_s=6.0,
        regret=Regret(mean_ratio=0.001, worst_ratio=0.007),
        nominal_layout=layout,
        nominal_step_s=4.9,
        nominal_regret=Regret(mean_ratio=0.1, worst_ratio=0.2),
        turns=(f"if the link were slow, {layout} would be 22.3% slower", "two", "three"),
    )
    text = "\n".join(lines_of(sample_plan(robustness=robust)))
    assert (
        " 0.7% more than the best layout of a draw. If the link were slow, pp1 dp8 tp1 zero2 mb1 "
        "x8, 3 recomputed, offload would be 22.3% slower. Two. " in " ".join(text.split())
    )
    assert "Three" not in text


def test_five_other_layouts_at_most_and_the_nearest_too_large() -> None:
    def other(name: str, step_s: float, peak_gib: int, reason: str) -> Alternative:
        return Alternative(
            layout=name, step_s=step_s, peak_bytes=peak_gib * GIB, reason=reason, needs="more"
        )

    fit = tuple(other(f"pp{n} dp1", 5.0 + n, 50, "slower; much") for n in range(1, 7))
    large = (other("pp1 dp4", 4.0, 70, "does not fit"), other("pp1 dp5", 3.0, 90, "no"))
    found = lines_of(sample_plan(alternatives=fit, excluded=large))
    start = found.index("Other layouts  step           why not")
    assert [line.split("  ")[0] for line in found[start + 1 : start + 7]] == [
        *(f"pp{n} dp1" for n in range(1, 5)),
        "pp1 dp4",
        "Note: all-gathers of 9.0 GiB are far out.",
    ]
    assert found[start + 1] == "pp1 dp1        6.00 s +20.0%  slower"
    assert found[start + 5] == "pp1 dp4        4.00 s -20.0%  6.0 GiB too large per GPU"
    assert "Other layouts" not in "\n".join(lines_of(sample_plan(alternatives=())))


def test_a_narrow_screen_says_how_much_slower_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert "pp1 dp8 tp1    +20.0%  +1.00 s tensor-parallel" in lines_of(sample_plan())


def test_notes_without_room_are_counted() -> None:
    found = lines_of(sample_plan(), notes=[f"remark {n}" for n in range(60)])
    assert len(found) == MOST_LINES
    shown = [line for line in found if line.startswith("Note: ")]
    assert f"{61 - len(shown)} more notes: --details" in found


def test_many_unlike_stages_are_counted() -> None:
    """Sixteen stages of 1, 2, 1, 2, ... layers: six have a line."""
    counts = [1 + n % 2 for n in range(16)]
    firsts = [0, *accumulate(counts)]
    stages = tuple(
        stage_plan(first, count, 4 * n, memory={MemoryLevel.NONE: count})
        for n, (first, count) in enumerate(zip(firsts, counts, strict=False))
    )
    cluster = replace(sample_plan().cluster, num_gpus=64)
    judged = estimate_of(*[stage_estimate()] * 16, step_s=20.0)
    found = lines_of(sample_plan(stages=stages, cluster=cluster, estimate=judged))
    assert "and 10 more stages: --details" in found
    assert len(found) <= MOST_LINES


@pytest.mark.parametrize("width", [60, 80, 100, 160])
@pytest.mark.parametrize("path", sorted(PLANS.glob("*.yaml")), ids=lambda path: path.stem)
def test_no_line_is_longer_than_the_screen(
    monkeypatch: pytest.MonkeyPatch, path: Path, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    notes = ["--cluster is not given: dgx-h100 is assumed (8 GPUs with NVLink 4, 400 Gb/s)"] * 3
    plan, files = load_plan(path), ["plan.yaml", "plan.png"]
    found = lines_of(plan, host_need(84), notes=notes, files=files, suggestions=["--tp 2"] * 3)
    assert max(map(len, found)) <= width
    assert width < 100 or len(found) <= MOST_LINES
    assert "".join(found).isascii()


def tight(peak_gib: int) -> Plan:
    stage = stage_estimate(peak_gib=peak_gib)
    return sample_plan(estimate=estimate_of(stage, stage))


@pytest.mark.parametrize(
    ("peak_gib", "verdict"),
    [
        (
            58,
            [
                "FITS, with 6.0 GiB to spare (peak +-10%, P(fits) 99%). The upper end, 63.8 GiB, "
                "fits too.",
            ],
        ),
        (
            64,
            [
                "FITS, with 0 B to spare (peak +-10%, P(fits) 94%). The upper end, 70.4 GiB, uses "
                "part of the margin and stays within the card.",
            ],
        ),
        (
            70,
            [
                "DOES NOT FIT: over by 6.0 GiB per GPU (peak +-10%, P(fits) 64%).",
                "The peak is 70.0 GiB; only the margin is exceeded: the card itself has 72.0 GiB "
                "usable, 2.0 GiB to spare (--margin 0.02 admits it).",
                "Runs that close to what the device reports crawl or fail.",
            ],
        ),
        (
            80,
            [
                "DOES NOT FIT: over by 16.0 GiB per GPU (peak +-10%, P(fits) 7%).",
                "The peak is 80.0 GiB; the card itself is exceeded: it has 72.0 GiB usable, "
                "8.0 GiB too few.",
            ],
        ),
    ],
)
def test_the_verdict_comes_first(
    monkeypatch: pytest.MonkeyPatch, peak_gib: int, verdict: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    found = lines_of(tight(peak_gib), suggestions=["--zero 3: 4.00 s per step"])
    assert found[: len(verdict)] == verdict
    assert found[len(verdict)].startswith("Predicted: 3.00 s per step (2.25 s to 3.75 s, ")
    assert "Try --zero 3: 4.00 s per step" in found


def test_an_upper_end_beyond_the_card_is_said() -> None:
    stage = stage_estimate(peak_gib=64)
    unsure = replace(estimate_of(stage, stage).uncertainty, memory_ratio=0.25)
    plan = sample_plan(estimate=replace(estimate_of(stage, stage), uncertainty=unsure))
    assert "The upper end, 80.0 GiB, exceeds the card." in " ".join(lines_of(plan)[:2])


def test_host_memory_that_overflows_is_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    plan, host = sample_plan(), host_need(324)
    assert lines_of(plan, host)[:2] == [
        "DOES NOT FIT in host memory: needs 324.0 GiB per node, of the 256.0 GiB that a plan may "
        "use, over by 68.0 GiB.",
        "Fits on the GPU, with 16.0 GiB to spare (peak +-10%, P(fits) 99%). The upper end, "
        "52.8 GiB, fits too.",
    ]
    found = check_json(plan, LIMITS, host, ())
    assert (found["fits"], found["margin_bytes"]) == (False, 16 * GIB)


def test_what_cannot_be_loaded_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    host = host_need(3, loading_bytes=260 * GIB)
    assert lines_of(sample_plan(), host)[0] == (
        "DOES NOT FIT in host memory: needs 260.0 GiB per node while weights are drawn, of the "
        "256.0 GiB that a plan may use, over by 4.0 GiB."
    )
    assert check_json(sample_plan(), LIMITS, host, ())["fits"] is False


def test_the_cost_stands_with_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    sheet = Sheet(plan=sample_plan(), limits=LIMITS, host=HOST, cost="$0.08 per 1 M tokens.")
    assert screen_lines(sheet)[1].endswith("MFU 43.2%. $0.08 per 1 M tokens.")
