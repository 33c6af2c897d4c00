"""Numbers of GPUs beside each other: the table, the JSON and the picture."""

import pytest

from mist.plans.objectives import Candidate
from mist.report.curve import curve, curve_png
from mist.report.gpu_count_tables import candidates_json, print_candidates
from tests.sample_plans import estimate_of, stage_estimate


def candidate(num_gpus: int, step_s: float | None, price_usd: float | None = 2.0) -> Candidate:
    """32 samples of 2048 tokens a step."""
    made = None if step_s is None else estimate_of(stage_estimate(), step_s=step_s)
    return Candidate(
        num_gpus=num_gpus,
        cluster="dgx-h100",
        device="h100-sxm",
        price_usd=price_usd,
        price_source="--price",
        estimate=made,
        why="" if made else "too large",
    )


ROWS = (candidate(4, None), candidate(8, 4.0), candidate(16, 2.5))


def test_the_table_has_what_a_renter_asks(capsys: pytest.CaptureFixture[str]) -> None:
    print_candidates(ROWS, 1, 1e12)
    text = capsys.readouterr().out
    assert text.startswith("Candidates (predicted, -25% to +25%, not calibrated)")
    cells = [
        [cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()
    ]
    rows = {row[0]: row[1:] for row in cells if row and row[0].isdigit()}
    assert rows["4"][-1] == "too large"
    # 16,384 tokens/s of 8 GPUs, and by hand 16 USD / 58.98 M tokens; 26,214 of 16.
    assert rows["8"][-8:] == [
        "4.00 s", "16.4 K", "2.05 K", "100%", "$0.271", "706 days", "$271 K", "chosen",
    ]  # fmt: skip
    assert rows["16"][-7:] == ["2.50 s", "26.2 K", "1.64 K", "80%", "$0.339", "442 days", "$339 K"]
    assert "Prices per GPU hour: dgx-h100 $2 (--price)." in text
    assert "Costs are those of the steps alone" in text


def test_without_a_price_there_is_no_cost(capsys: pytest.CaptureFixture[str]) -> None:
    print_candidates([candidate(8, 4.0, None)], 0, None)
    text = capsys.readouterr().out
    assert "Prices" not in text
    assert "days" not in text


def test_the_json_of_candidates() -> None:
    none, first, _ = candidates_json(ROWS, 1, 1e12)
    assert {key for key, value in none.items() if value is None} == {
        "step_s", "tokens_per_s", "tokens_per_s_per_gpu", "scaling_ratio", "peak_bytes",
        "step_low_ratio", "step_high_ratio", "usd_per_million_tokens", "tokens_s", "tokens_usd",
    }  # fmt: skip
    assert (none["why"], none["chosen"], first["chosen"]) == ("too large", False, True)
    assert first["tokens_per_s_per_gpu"] == 2048
    assert (first["step_low_ratio"], first["step_high_ratio"]) == (0.75, 1.25)
    assert first["tokens_s"] == 1e12 / 16384


def test_the_picture_has_speed_and_cost() -> None:
    speed, cost = curve("toy", ROWS, 1).axes
    assert speed.lines[0].get_xydata().tolist() == [[8, 16384], [16, 26214.4]]
    assert cost.lines[0].get_ydata().tolist() == pytest.approx([0.271267, 0.339084], rel=1e-5)
    assert speed.collections[-1].get_offsets().tolist() == [[8, 16384]]
    (alone,) = curve("toy", [candidate(8, 4.0, None), candidate(4, 5.0, None)], 0).axes
    assert alone.get_ylabel() == "predicted tokens/s"


def test_the_same_candidates_give_the_same_picture() -> None:
    assert curve_png("toy", ROWS, 1) == curve_png("toy", ROWS, 1)
