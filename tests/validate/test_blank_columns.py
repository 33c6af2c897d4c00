"""Blank columns: which cases a run is predicted in, and how one prediction comes of them."""

from dataclasses import replace

import pytest

from mist.validate.blank_columns import filled_runs, joined
from mist.validate.results import RunPrediction
from mist.validate.sources import Sources, load_sources
from tests.validate.rows import run


def cases(sources: Sources | None = None, **columns: object) -> list[tuple[str, object]]:
    """Of each case of a run the column that is filled in, and with what."""
    found = filled_runs(run(**columns), sources or load_sources())
    return [(case.column, getattr(case.run, case.column or "run_id")) for case in found]


def test_a_run_that_says_all_is_its_only_case() -> None:
    (case,) = filled_runs(run(), load_sources())
    assert (case.run, case.column) == (run(), "")


def test_a_layout_that_nobody_states_is_one_of_the_usual_ones() -> None:
    """Tensor parallelism in a node, no stages, copies for the rest; 4 heads cannot be cut in 8."""
    first, *rest = filled_runs(run(dp=None, tp=None, pp=None, n_heads=4), load_sources())
    layouts = [(case.run.dp, case.run.tp, case.run.pp) for case in (first, *rest)]
    assert layouts == [(2, 4, 1), (8, 1, 1), (4, 2, 1)]
    assert [case.column for case in (first, *rest)] == ["", "tp", "tp"]
    assert len({case.run.run_id for case in (first, *rest)}) == 3


@pytest.mark.parametrize(
    ("columns", "likeliest", "others"),
    [
        # By the rule for sources that no table has, tp makes it Megatron's: ZeRO-1 or none.
        ({"zero_or_fsdp": "", "tp": 2}, "zero1", ["none"]),
        ({"zero_or_fsdp": "", "tp": 1}, "fsdp2-zero3", ["fsdp2-zero2", "zero1", "none"]),
        ({"zero_or_fsdp": "", "tp": 2, "dp": 1}, "zero1", []),  # nobody to share with
        ({"source": "vtrain-single", "zero_or_fsdp": ""}, "", []),  # the table says that it is 0
        ({"activation_ckpt": ""}, "none", ["selective", "full"]),
        ({"source": "hagemann23", "activation_ckpt": ""}, "none", ["full"]),  # has no other
        ({"activation_ckpt": "partial"}, "none", ["full"]),
        ({"micro_batch": None, "grad_accum": None}, 1, [2, 4, 8]),  # 32 samples on 4 ranks
        ({"micro_batch": None, "grad_accum": 4}, 2, []),  # 32 / 4 / 4
        ({"micro_batch": None, "grad_accum": None, "global_batch": 12}, 1, []),  # 3 a rank
        ({"grad_accum": None, "global_batch": None}, 1, [8]),  # nobody says how many samples
        ({"grad_accum": None}, None, []),  # 32 samples on 4 ranks of 2: the layout counts them
        ({"precision": ""}, "bf16", []),
        ({"vocab": None}, 50304, [32000, 128256]),
        ({"ffn_hidden": None, "arch": "dense-gpt"}, 1024, []),  # 4 x 256
        ({"ffn_hidden": None}, 768, [896]),  # 8/3 x 256 in multiples of 256; 3.5 x 256
        ({"n_heads": None}, 2, [4]),
        ({"dp": None}, 4, []),  # 8 GPUs, tp 2
        ({"gpu": ""}, "", []),  # any GPU is no interval
    ],
)
def test_the_cases_of_a_column(
    columns: dict[str, object], likeliest: object, others: list[object]
) -> None:
    column = next(name for name, value in columns.items() if value in (None, "", "partial"))
    first, *rest = filled_runs(run(**columns), load_sources())
    assert (first.column, getattr(first.run, column)) == ("", likeliest)
    assert [(case.column, getattr(case.run, column)) for case in rest] == [
        (column, value) for value in others
    ]
    assert len({case.run.run_id for case in (first, *rest)}) == 1 + len(others)


def test_the_table_of_stages_says_what_is_partial() -> None:
    one = run(activation_ckpt="partial")
    (case,) = filled_runs(one, load_sources(), has_stages=True)
    assert case.run is one


def test_columns_vary_one_at_a_time() -> None:
    found = cases(zero_or_fsdp="", activation_ckpt="")
    assert found == [
        ("", "one"),
        ("zero_or_fsdp", "none"),
        ("activation_ckpt", "selective"),
        ("activation_ckpt", "full"),
    ]


def test_the_runtime_is_that_of_what_the_run_says() -> None:
    sources = load_sources()
    for columns in ({"tp": 1}, {"tp": 2}, {"tp": 1, "precision": "fp16"}):
        one = run(zero_or_fsdp="", **columns)
        runtimes = {sources.of(case.run).runtime for case in filled_runs(one, sources)}
        assert runtimes == {sources.of(one).runtime}


def made(step_s: float, peak_gib: float, chance: float, status: str = "predicted") -> RunPrediction:
    return RunPrediction(
        run=run(),
        status=status,  # type: ignore[arg-type]
        step_s=step_s,
        step_low_s=0.8 * step_s,
        step_high_s=1.25 * step_s,
        peak_gib=peak_gib,
        peak_low_gib=0.9 * peak_gib,
        peak_high_gib=1.1 * peak_gib,
        fit_probability=chance,
    )


def test_ends_are_of_all_cases_and_columns_multiply() -> None:
    one = run(zero_or_fsdp="", activation_ckpt="")
    filled = filled_runs(one, load_sources())
    rows = [made(1.0, 40.0, 1.0), made(0.9, 60.0, 0.7), made(1.1, 30.0, 1.0), made(1.3, 20.0, 1.0)]
    row = joined(one, [*zip(filled, rows, strict=True)])
    assert row.run is one
    assert (row.step_s, row.peak_gib) == (1.0, 40.0)
    assert row.step_low_s == pytest.approx(0.8 * 0.9)
    assert row.step_high_s == pytest.approx(1.25 * 1.3)
    assert row.peak_low_gib == pytest.approx(0.9 * 20)
    assert row.peak_high_gib == pytest.approx(1.1 * 60)
    assert row.fit_probability == pytest.approx((1 + 0.7 + 1 + 1) / 4)
    assert row.reason == (
        "zero_or_fsdp not given: zero1, or none; "
        "activation_ckpt not given: none, or selective, full"
    )


def test_a_case_that_is_not_predicted_does_not_count() -> None:
    one = run(zero_or_fsdp="")
    first, second = filled_runs(one, load_sources())
    lone = made(1.0, 40.0, 0.99)
    other = made(9.0, 9.0, 0.0, status="unsupported")
    assert joined(one, [(first, lone), (second, other)]) == replace(lone, run=one)
    failed = RunPrediction(run=first.run, status="unsupported", reason="why")
    assert joined(one, [(first, failed), (second, lone)]).reason == "why"
