"""Writes docs/accuracy.md and its plot: `make accuracy RUNS=runs.csv STAGES=stages.csv`."""

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from mist.symbolic.load_programs import quiet
from mist.validate.results import Errors, Ranking, RunPrediction, Score
from mist.validate.scores import is_core, is_regular
from mist.workflow.validating import Validation, validate

DOCS = Path(__file__).parents[2] / "docs"
FEWEST = 3  # runs of a source that is shown
FEWEST_IN_BOX = 10
LEFT_OUT = Path(__file__).with_name("fit.md")
TRANSFERS = Path(__file__).with_name("transfers.md")
TEMPLATE = Path(__file__).with_suffix(".md")


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([row(head), row(["---"] * len(head)), *map(row, rows)])


def percent(errors: Errors | None) -> str:
    return "-" if errors is None else f"{100 * errors.median:.1f} / {100 * errors.p90:.1f}"


def times(found: Sequence[Score], plain: dict[str, Score]) -> str:
    head = ("source", "runs", "calibrated", "uncalibrated", "one rate per GPU")
    shown = [score for score in found if score.time and score.time.count >= FEWEST]
    return table(
        head,
        [
            (score.source, str(score.time.count), percent(score.time),
             percent(plain[score.source].time), percent(score.constant))
            for score in shown if score.time
        ],
    )  # fmt: skip


def memory(found: Sequence[Score]) -> str:
    head = ("source", "runs", "peak", "of stages", "within the interval", "out of memory: "
            "precision / recall", "runs that fitted kept")  # fmt: skip
    shown = [s for s in found if s.memory or s.stage_memory or s.recall is not None]
    return table(
        head,
        [
            (s.source, str(s.memory.count if s.memory else s.runs), percent(s.memory),
             percent(s.stage_memory), ratio(s.covered_ratio),
             f"{ratio(s.precision)} / {ratio(s.recall)}", ratio(s.kept_ratio))
            for s in shown
        ],
    )  # fmt: skip


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def rankings(found: Sequence[Score]) -> str:
    head = ("source", "groups", "mean regret", "best of three", "tau", "naive regret")

    def cells(score: Score, own: Ranking, naive: Ranking | None) -> tuple[str, ...]:
        return (
            score.source, str(own.count), ratio(own.mean_regret), ratio(own.top3_regret),
            f"{own.tau:.2f}", ratio(naive.mean_regret if naive else None),
        )  # fmt: skip

    return table(head, [cells(s, s.ranking, s.naive) for s in found if s.ranking])


def timed(rows: Sequence[RunPrediction]) -> list[RunPrediction]:
    """Runs whose step times are compared in the plots."""
    return [r for r in rows if r.status == "predicted" and r.run.outcome == "ok"
            and r.run.step_time_s and is_regular(r) and is_core(r)]  # fmt: skip


def plot(judged: Sequence[RunPrediction]) -> Figure:
    figure = Figure(figsize=(8.0, 6.0), layout="constrained")
    axes = figure.add_subplot()
    for source in sorted({r.run.source for r in judged}):
        own = [r for r in judged if r.run.source == source]
        if len(own) >= FEWEST:
            axes.plot([r.run.step_time_s for r in own], [r.step_s for r in own], "o", ms=3,
                      alpha=0.5, label=f"{source} ({len(own)})")  # fmt: skip
    ends = [0.05, 200.0]
    axes.plot(ends, ends, color="black", lw=0.8)
    for factor in (0.8, 1.25):
        axes.plot(ends, [factor * end for end in ends], color="black", lw=0.5, ls=":")
    axes.set(xscale="log", yscale="log", xlabel="measured step time, s",
             ylabel="predicted step time, s")  # fmt: skip
    axes.legend(fontsize=8)
    return figure


def plot_by(judged: Sequence[RunPrediction]) -> Figure:
    """Errors of step times by tensor and pipeline parallelism and micro-batch."""
    figure = Figure(figsize=(8.0, 3.5), layout="constrained")
    for axes, name in zip(
        figure.subplots(1, 3, sharey=True), ("tp", "pp", "micro_batch"), strict=True
    ):
        errors: dict[int, list[float]] = defaultdict(list)
        for row in judged:
            errors[getattr(row.run, name)].append(100 * (row.step_s / row.run.step_time_s - 1))
        shown = {
            value: errors[value] for value in sorted(errors) if len(errors[value]) >= FEWEST_IN_BOX
        }
        labels = [f"{value}\n{len(found)}" for value, found in shown.items()]
        axes.boxplot(list(shown.values()), whis=(5, 95), showfliers=False, tick_labels=labels)
        axes.axhline(0.0, color="black", lw=0.5, ls=":")
        axes.set(xlabel=f"{name} (below: runs)")
    figure.axes[0].set(ylabel="predicted over measured step, % off")
    return figure


def average(found: Sequence[Score]) -> tuple[float, int]:
    medians = [s.core.median for s in found if s.core and s.core.count >= 4]
    return 100 * mean(medians), len(medians)


def main(runs: Path, stages: Path | None) -> None:
    def judged(*, calibrated: bool) -> Validation:
        return validate(runs, stages, calibrated=calibrated, progress=quiet)

    fitted, plain = judged(calibrated=True), judged(calibrated=False)
    mean_fitted, averaged = average(fitted.scores)
    text = TEMPLATE.read_text().format(
        runs=len(fitted.rows),
        sources=len(fitted.scores),
        predicted=sum(row.is_predicted for row in fitted.rows),
        left_out=LEFT_OUT.read_text().rstrip(),
        transfers=TRANSFERS.read_text().rstrip(),
        times=times(fitted.scores, {score.source: score for score in plain.scores}),
        memory=memory(fitted.scores),
        rankings=rankings(fitted.scores),
        averaged=averaged,
        calibrated=mean_fitted,
        uncalibrated=average(plain.scores)[0],
    )
    (DOCS / "accuracy.md").write_text(text)
    judged_rows = timed(fitted.rows)
    for name, figure in (("accuracy", plot(judged_rows)), ("accuracy-by", plot_by(judged_rows))):
        figure.savefig(DOCS / f"images/{name}.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
