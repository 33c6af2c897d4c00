"""What is printed and what tools get: every figure that a plan or a check owes its reader."""

from dataclasses import replace

import pytest

from mist.plans.plan import Alternative, Offload, Plan, Schedule, StageEstimate
from mist.plans.provenance import Kind
from mist.plans.workload import MemoryLevel, ScheduleKind
from mist.report.plan_tables import check_json, plan_json, print_details
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

NOTES = ("no list of layers", "profile torch has changed.")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # no cell is folded


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, with runs of blanks and line breaks as one blank."""
    return " ".join(capsys.readouterr().out.split())


def rows(text: str, start: str) -> list[list[str]]:
    """Cells of the table rows that begin with a number, in the table of that title."""
    lines = text[text.index(start) :].splitlines()
    body = lines[next(i for i, line in enumerate(lines) if "───" in line) + 1 :]
    table = body[: next(i for i, line in enumerate(body) if not line.strip())]
    return [[cell.strip() for cell in line.split("   ") if cell.strip()] for line in table]


def test_a_plan_is_told_whole(capsys: pytest.CaptureFixture[str]) -> None:
    print_details(sample_plan(), HOST, NOTES)
    text = printed(capsys)
    for words in (
        "Note: no list of layers. Note: profile torch has changed. "
        "Note: all-gathers of 9.0 GiB are far out. Searched",
        "Searched 0 stages in 3 groups; solver: by hand; optimality gap 0 of the step.",
        "Uncertainty: public runs.",
        "Not modelled: data loading; stragglers.",
    ):
        assert words in text


def test_stages_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_details(sample_plan(), HOST, ())
    shared = ("2", "2+sp", "1", "2 x8", "1 full", "nothing")
    assert rows(capsys.readouterr().out, "Stages (") == [
        ["0: layers 0-7", "0-3", *shared, "500 ms", "250 ms", "compute 375 ms, tp 125 ms"],
        ["1: layers 8-15", "4-7", *shared, "250 ms", "250 ms", "compute 188 ms, tp 62.5 ms"],
    ]


def test_copies_of_the_states_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    stage = stage_plan(devices=(0, 8), dp=4, micro_batch=1, dp_replicate=2)
    print_details(sample_plan(stages=(stage,), estimate=estimate_of(stage_estimate())), HOST, ())
    assert rows(capsys.readouterr().out, "Stages (")[0][2] == "2x2"


def test_chunks_levels_and_offloads_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    levels = {MemoryLevel.NONE: 4, MemoryLevel.SELECTIVE: 3, MemoryLevel.FULL: 1}
    offload = Offload(optimizer=0.5, activations=0.375)
    plan = sample_plan(
        schedule=Schedule(kind=ScheduleKind.INTERLEAVED, vpp=2),
        stages=(
            stage_plan(layers=((0, 4), (8, 4)), memory=levels, offload=offload),
            stage_plan(layers=((4, 4), (12, 4)), device=4),
        ),
        estimate=estimate_of(hosted(20), hosted(3), step_s=5.0),
    )
    print_details(plan, HOST, ())
    text = capsys.readouterr().out
    found = rows(text, "Stages (")
    assert [(row[0], *row[6:8]) for row in found] == [
        (
            "0: layers 0-3, 8-11",
            "3 selective, 1 full",
            "optimizer 50%, activations 38%",
        ),
        ("1: layers 4-7, 12-15", "1 full", "nothing"),
    ]
    assert [row[-1] for row in rows(text, "Memory per GPU")] == ["20.0 GiB", "3.0 GiB"]


def test_parts_below_the_rounding_are_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    noisy = replace(stage_estimate(), time_parts_s={"compute": 0.5, "dp": 4.9e-6, "tp": 5.1e-6})
    stage = replace(noisy, delta_s=1.0)
    print_details(sample_plan(estimate=estimate_of(stage, stage, step_s=5.0)), HOST, ())
    text = capsys.readouterr().out
    assert [row[-1] for row in rows(text, "Stages (")] == ["compute 500 ms, tp 5.10 us"] * 2


def hosted(gib: int) -> StageEstimate:
    return replace(stage_estimate(), host_bytes=gib * GIB)


def test_memory_is_a_table_of_parts(capsys: pytest.CaptureFixture[str]) -> None:
    print_details(sample_plan(), HOST, ())
    assert rows(capsys.readouterr().out, "Memory per GPU (peak +-10%, P(fits) 99%)") == [
        ["0", "30.0 GiB", "10.0 GiB", "40.0 GiB", "0 B"],
        ["1", "30.0 GiB", "18.0 GiB", "48.0 GiB", "0 B"],
    ]


def test_how_operations_are_priced_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_details(sample_plan(), HOST, ())
    text = capsys.readouterr().out
    body = text[text.index("Op costs") :].splitlines()[4:6]
    assert [line.split() for line in body] == [
        ["matrix", "products", "law", "fit", "public", "tables"],
        ["collectives", "table", "measured", "NCCL"],
    ]


def test_alternatives_are_a_table_with_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    large = Alternative(
        layout="pp1 dp4", step_s=4.0, peak_bytes=70 * GIB, reason="does not fit", needs="more"
    )
    print_details(sample_plan(excluded=(large,)), HOST, ())
    text = capsys.readouterr().out
    found = rows(text, "Other layouts that fit")
    assert found[0][:4] == ["pp1 dp8 tp1", "6.00 s", "+20.0%", "50.0 GiB"]
    assert " ".join(row[-1] for row in found) == (
        "+1.00 s tensor-parallel collectives; ties if tensor-parallel collectives took 50.0 % less "
        "in both"
    )
    assert rows(text, "Faster, too large") == [
        ["pp1 dp4", "4.00 s", "-20.0%", "70.0 GiB", "does not fit; more"]
    ]


def test_a_plan_without_alternatives_prints_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_details(sample_plan(alternatives=()), HOST, ())
    assert "Other layouts" not in capsys.readouterr().out


def tight(peak_gib: int) -> Plan:
    stage = stage_estimate(peak_gib=peak_gib)
    return sample_plan(estimate=estimate_of(stage, stage))


def test_host_memory_is_told_with_its_kind(capsys: pytest.CaptureFixture[str]) -> None:
    plan = sample_plan(estimate=estimate_of(hosted(61), hosted(3)))
    print_details(plan, host_need(256), ())
    text = printed(capsys)
    assert (
        "This needs 256.0 GiB of host memory per node, of 320.0 GiB (guess), of which a plan may "
        "use 80%. Source: usual servers. Give yours with --host-memory." in text
    )
    assert "While weights are drawn, the ranks of a node have up to 6.0 GiB of host memory." in text
    print_details(plan, host_need(256, kind=Kind.SPEC, loading_bytes=None), ())
    text = printed(capsys)
    assert "of 320.0 GiB (spec), of which a plan may use 80%. Source: usual servers. Host" in text
    assert "Host memory while the framework loads weights is not modelled." in text


def test_the_json_of_a_plan() -> None:
    found = plan_json(sample_plan(), {"prepare": 0.12345, "search": 2.0}, HOST, NOTES)
    assert [*found] == [
        "schema",
        "model",
        "workload",
        "cluster",
        "runtime",
        "schedule",
        "num_micro_batches",
        "stages",
        "estimate",
        "alternatives",
        "excluded",
        "provenance",
        "fit_probability",
        "host_memory",
        "seconds",
        "notes",
    ]
    assert found["seconds"] == {"prepare": 0.123, "search": 2.0}
    assert found["notes"] == [*NOTES]


def test_the_json_of_a_check() -> None:
    assert check_json(sample_plan(), LIMITS, HOST, NOTES) == {
        "params": 8_030_261_248,
        "trainable_params": 8_030_261_248,
        "overrides": {},
        "fits": True,
        "fit_probability": 1.0,
        "margin_bytes": 16 * GIB,
        "limit_bytes": 64 * GIB,
        "host_limit_bytes": 32 * GIB,
        "host_memory": {
            "held_bytes": 0,
            "loading_bytes": 6 * GIB,
            "drawn_bytes": GIB // 2,
            "memory_bytes": 320 * GIB,
            "limit_bytes": 256 * GIB,
            "kind": "guess",
            "source": "usual servers",
            "needed_bytes": 6 * GIB,
            "fits": True,
        },
        "step_s": 5.0,
        "tokens_per_s": 13107.2,
        "mfu": 0.4321,
        "uncertainty": {
            "step_low_ratio": 0.75,
            "step_high_ratio": 1.25,
            "memory_ratio": 0.1,
            "calibrated": False,
            "basis": "public runs",
        },
        "stages": [
            {
                "peak_bytes": peak * GIB,
                "host_bytes": 0,
                "usable_bytes": 72 * GIB,
                "parts": {"states": 30 * GIB, "activations": (peak - 30) * GIB},
                "stable_s": stable_s,
                "delta_s": 0.25,
                "time_parts_s": {"compute": 0.75 * stable_s, "tp": 0.25 * stable_s, "dp": 0.0},
            }
            for stable_s, peak in ((0.5, 40), (0.25, 48))
        ],
        "op_costs": [
            {"what": "matrix products", "how": "law", "source": "public tables", "kind": "fit"},
            {"what": "collectives", "how": "table", "source": "NCCL", "kind": "measured"},
        ],
        "extrapolated": ["all-gathers of 9.0 GiB are far out"],
        "notes": [*NOTES],
        "not_modelled": ["data loading", "stragglers"],
    }


def test_the_json_of_a_check_that_fails() -> None:
    found = check_json(tight(70), LIMITS, HOST, ())
    assert (found["fits"], found["margin_bytes"]) == (False, -6 * GIB)
