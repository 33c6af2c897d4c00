"""Predicted beside measured, for people (tables) and for tools (one JSON object)."""

from dataclasses import asdict

from mist.calibrate.run_comparison import Beside, RunComparison
from mist.plans.breakdown import PART_NAMES, ROUNDING_RATIO, layout_words
from mist.report.tables import say, say_note, show
from mist.units import format_bytes, format_count, format_seconds


def print_compared(found: RunComparison) -> None:
    """Each figure beside its prediction, where the predicted step goes, what was exchanged."""
    plan = found.plan
    layout = layout_words(plan.layout)
    say(f"{plan.model.name} on {plan.cluster.num_gpus} x {plan.cluster.device}: {layout}")
    show(
        f"Predicted and measured ({found.num_steps} steps)",
        ("figure", "predicted", "measured", "predicted is off by", "within what was promised"),
        [
            (
                row.what,
                _figure(row, row.predicted),
                _figure(row, row.measured) + _spread(row),
                f"{row.error_ratio:+.1%}",
                f"{'yes' if row.is_within else 'no'} ({_interval(row)})",
            )
            for row in found.rows
        ],
    )
    step_s = plan.estimate.step_s
    show(
        "The predicted step by part",
        ("part", "time", "of the step"),
        [
            (PART_NAMES[part], format_seconds(seconds), f"{seconds / step_s:.1%}")
            for part, seconds in found.parts_s.items()
            if abs(seconds) > ROUNDING_RATIO * step_s
        ],
    )
    _print_stages(found)
    if any(found.collectives):
        show(
            "Collectives of one step, as counted on the first rank of each stage",
            ("stage", "axis", "collectives", "bytes", "kind"),
            [
                (str(stage), row.axis, str(row.count), format_bytes(row.num_bytes), row.kind)
                for stage, rows in enumerate(found.collectives)
                for row in rows
            ],
        )
    if len(found.rows) == 2:
        say_note("the log has no stages, so memory cannot be compared")
    say_note("peaks are of tensors: the predicted share of the allocator is left out")


def _print_stages(found: RunComparison) -> None:
    rows = [
        (
            str(index),
            what,
            "-" if predicted is None else format_seconds(predicted),
            format_seconds(s),
        )
        for index, stage in enumerate(found.stages)
        for what, predicted, s in (
            ("at work", stage.predicted_work_s, stage.work_s),
            ("  forward", None, stage.parts.forward_s),
            ("  backward", None, stage.parts.backward_s),
            ("  optimizer", None, stage.parts.optimizer_s),
            ("transfers, sums, waiting", stage.predicted_rest_s, stage.rest_s),
            ("  sums", None, stage.parts.sums_s),
        )
    ]
    if rows:
        title = "The step of each stage (measured: medians, mean of its ranks)"
        show(title, ("stage", "part", "predicted", "measured"), rows)


def compared_json(found: RunComparison) -> dict[str, object]:
    """`figures` (unit, predicted, measured, ratios), `parts_s`, and `stages` with collectives.

    `stage_steps`: of each stage, what was measured beside what was predicted; empty for a log
    without.
    """
    return {
        "figures": [
            {**asdict(row), "error_ratio": row.error_ratio, "is_within": row.is_within}
            for row in found.rows
        ],
        "num_steps": found.num_steps,
        "parts_s": found.parts_s,
        "stage_steps": [asdict(stage) for stage in found.stages],
        "stages": [{"collectives": [asdict(each) for each in rows]} for rows in found.collectives],
    }


def _figure(row: Beside, value: float) -> str:
    if row.unit == "s":
        return format_seconds(value)
    return format_bytes(value) if row.unit == "B" else f"{format_count(value)} {row.unit}"


def _interval(row: Beside) -> str:
    return f"{row.low_ratio - 1:+.0%} to {row.high_ratio - 1:+.0%}"


def _spread(row: Beside) -> str:
    return f" +-{row.spread_ratio:.1%}" if row.spread_ratio else ""
