"""Predictions of measured runs: the table of scores, a file with a row for each run, JSON."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from statistics import mean

from mist.report.tables import say, say_note, show
from mist.validate.results import Errors, Ranking, RunPrediction, Score

COLUMNS = (
    "run_id",
    "status",
    "reason",
    "platform",
    "runtime",
    "memory_kind",
    "predicted_step_s",
    "predicted_step_low_s",
    "predicted_step_high_s",
    "predicted_peak_gib",
    "predicted_peak_low_gib",
    "predicted_peak_high_gib",
    "predicted_fits",
    "predicted_fit_probability",
    "calibrated",
)
MIN_ROWS = 4  # of a source that counts in the average


def predictions_csv(rows: Sequence[RunPrediction]) -> str:
    """One line for each run, in order; blank where nothing is predicted."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        known = row.status == "predicted"
        writer.writerow(
            [
                row.run.run_id,
                row.status,
                row.reason,
                row.platform,
                row.runtime,
                row.memory_kind if known else "",
                *(_figure(value) for value in
                  (row.step_s, row.step_low_s, row.step_high_s,
                   row.peak_gib, row.peak_low_gib, row.peak_high_gib)),
                "" if row.fits is None else str(row.fits).lower(),
                _figure(row.fit_probability),
                str(row.calibrated).lower() if known else "",
            ]
        )  # fmt: skip
    return text.getvalue()


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def print_scores(scores: Sequence[Score], *, calibrated: bool) -> None:
    """Errors, feasibility and rankings of each source, beside the baselines."""
    judged = [score for score in scores if score.predicted]
    show(
        "Errors in %: median / 90th percentile (signed median), runs of tiers A and B",
        ("source", "runs", "predicted", "step time", "peak memory", "of stages", "in interval",
         "constant rate"),
        [
            (score.source, str(score.runs), str(score.predicted), _errors(score.time),
             _errors(score.memory), _errors(score.stage_memory),
             _percent(score.covered_ratio), _errors(score.constant))
            for score in judged
        ],
    )  # fmt: skip
    show(
        "Choosing by predictions (regret: how much slower than the best run of a group, in %)",
        ("source", "groups", "mean regret", "median", "best of 3", "tau", "naive regret",
         "oom precision", "oom recall", "fits kept"),
        [
            (score.source, *_ranking(score.ranking), _regret(score.naive),
             _percent(score.precision), _percent(score.recall), _percent(score.kept_ratio))
            for score in judged if score.ranking or score.recall is not None
        ],
    )  # fmt: skip
    averaged = [s.core.median for s in judged if s.core and s.core.count >= MIN_ROWS]
    if averaged:
        kind = "calibrated" if calibrated else "uncalibrated"
        say(
            f"Mean over {len(averaged)} sources of median errors of {kind} times "
            f"(dense pretraining in bf16 or fp16): {100 * mean(averaged):.1f} %"
        )
    say_note("a source's figures are predictions of its published runs, each with its own noise")


def _errors(errors: Errors | None) -> str:
    if errors is None:
        return "-"
    median, p90, signed = (100 * each for each in (errors.median, errors.p90, errors.signed))
    return f"{median:.1f} / {p90:.1f} ({signed:+.1f}) n={errors.count}"


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * ratio:.1f}"


def _ranking(ranking: Ranking | None) -> tuple[str, ...]:
    if ranking is None:
        return ("-",) * 5
    regrets = (ranking.mean_regret, ranking.median_regret, ranking.top3_regret)
    return (str(ranking.count), *map(_percent, regrets), f"{ranking.tau:.2f}")


def _regret(ranking: Ranking | None) -> str:
    return "-" if ranking is None else _percent(ranking.mean_regret)


def scores_json(scores: Sequence[Score]) -> dict[str, object]:
    """Every score as numbers (ratios, not %)."""
    return {"sources": [asdict(score) for score in scores]}
