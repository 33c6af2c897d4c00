"""How good predictions are: errors, feasibility, and the regret of choosing by them.

Errors and rankings are over runs that succeeded, of tiers A and B, that are predicted; times over
those that did not stall (see `is_regular`); feasibility also over those that ran out of memory.
A run that is refused is predicted to fail: had it run, it would count as wrongly refused.
Regret of a ranking group: the measured time of the run that is predicted to be the fastest, over
that of the fastest, less 1; runs predicted alike (to 1e-9) count by their mean. Kendall's tau is
tau-b.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mist.validate.baselines import Times, constant_utilisation, flops_and_bubble
from mist.validate.measured_runs import Run, Stages
from mist.validate.results import Errors, Ranking, RunPrediction, Score

MIN_GROUP = 4
MB_PER_GIB = 1024.0
MIN_MFU = 5.0  # %; below, runs wait for something that no layout explains
MAX_PEAK_RATIO = 0.9  # of usable memory; above, published runs crawl from allocator retries
TIERS = ("A", "B")


def scored(rows: Sequence[RunPrediction], stages: Stages) -> tuple[Score, ...]:
    """A score for each source, by its name; `stages`: measured peaks of pipeline stages."""
    by_source: dict[str, list[RunPrediction]] = defaultdict(list)
    for row in rows:
        by_source[row.run.source].append(row)
    constant = constant_utilisation([row for row in rows if row.status == "predicted"])
    return tuple(
        _score(source, found, constant, stages) for source, found in sorted(by_source.items())
    )


def _score(source: str, rows: Sequence[RunPrediction], constant: Times, stages: Stages) -> Score:
    judged = [row for row in rows if row.is_predicted and row.run.tier in TIERS]
    ran = [row for row in judged if row.run.outcome == "ok"]
    regular = [row for row in ran if row.status == "predicted" and is_regular(row)]
    times = {row.run.run_id: row.step_s for row in regular if row.step_s is not None}
    precision, recall = feasibility(judged)
    return Score(
        source=source,
        runs=len(rows),
        predicted=sum(row.is_predicted for row in rows),
        time=errors((row.step_s, row.run.step_time_s) for row in regular),
        core=errors((row.step_s, row.run.step_time_s) for row in regular if is_core(row)),
        memory=errors((row.peak_gib, row.run.peak_memory_gib) for row in ran),
        stage_memory=errors(_of_stages(ran, stages)),
        covered_ratio=_covered(ran),
        precision=precision,
        recall=recall,
        kept_ratio=sum(bool(row.fits) for row in ran) / len(ran) if ran else None,
        ranking=ranking(regular, times),
        constant=errors((constant.get(row.run.run_id), row.run.step_time_s) for row in regular),
        naive=ranking(regular, flops_and_bubble(regular)),
    )


def _of_stages(
    rows: Iterable[RunPrediction], stages: Stages
) -> Iterator[tuple[float | None, float | None]]:
    """Predicted and measured peaks of stages, in GiB."""
    for row in rows:
        measured = stages.get(row.run.run_id, ())
        for made, stage in zip(row.stage_gib, measured, strict=False):
            peak = stage.peak_allocated_mb
            yield made, None if peak is None else peak / MB_PER_GIB


def is_core(row: RunPrediction) -> bool:
    """Whether a run is what most models are about: dense pretraining in bf16 or fp16.

    Of a run with blank columns (`reason` names them) the interval is judged, not one case of many.
    """
    run = row.run
    if row.reason:
        return False
    dense = not run.arch.startswith("moe")
    return dense and run.task in ("", "pretrain") and run.precision in ("bf16", "fp16")


def is_regular(row: RunPrediction) -> bool:
    """Whether a predicted run is regular: no time is judged else."""
    return runs_regularly(row.run, row.usable_gib)


def runs_regularly(run: Run, usable_gib: float | None) -> bool:
    """Whether a run is known neither to stall nor to fight for memory."""
    stalls = run.mfu is not None and run.mfu < MIN_MFU
    peak = run.peak_memory_gib
    full = peak is not None and usable_gib is not None and peak > MAX_PEAK_RATIO * usable_gib
    return not stalls and not full


def errors(pairs: Iterable[tuple[float | None, float | None]]) -> Errors | None:
    """Of (predicted, measured) pairs; those without both are left out."""
    ratios = np.array([made / real - 1 for made, real in pairs if made and real])
    if not len(ratios):
        return None
    size = np.abs(ratios)
    return Errors(
        count=len(ratios),
        median=float(np.median(size)),
        p90=float(np.percentile(size, 90)),
        signed=float(np.median(ratios)),
    )


def _covered(rows: Iterable[RunPrediction]) -> float | None:
    """The share of measured peaks within their interval."""
    inside = [
        row.peak_low_gib <= row.run.peak_memory_gib <= row.peak_high_gib
        for row in rows
        if row.run.peak_memory_gib and row.peak_low_gib is not None and row.peak_high_gib
    ]
    return sum(inside) / len(inside) if inside else None


def feasibility(rows: Iterable[RunPrediction]) -> tuple[float | None, float | None]:
    """Precision and recall of "does not fit"; None without a run that ran out of memory."""
    judged = [(row.fits is False, row.run.outcome == "oom")
              for row in rows if row.run.outcome in ("ok", "oom")]  # fmt: skip
    if not any(real for _, real in judged):
        return None, None
    hits = sum(said and real for said, real in judged)
    said = sum(said for said, _ in judged)
    return (hits / said if said else None), hits / sum(real for _, real in judged)


def ranking(rows: Iterable[RunPrediction], predicted_s: Times) -> Ranking | None:
    """Of the ranking groups with at least four runs; `predicted_s` by run."""
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        real, name = row.run.step_time_s, row.run.run_id
        if row.run.ranking_group and real and name in predicted_s:
            groups[row.run.ranking_group].append((predicted_s[name], real))
    sizes = [np.array(pairs) for pairs in groups.values() if len(pairs) >= MIN_GROUP]
    if not sizes:
        return None
    regrets = np.array([regret(pairs[:, 0], pairs[:, 1]) for pairs in sizes])
    best_of_3 = [regret(pairs[:, 0], pairs[:, 1], picks=3) for pairs in sizes]
    return Ranking(
        count=len(sizes),
        mean_regret=float(regrets.mean()),
        median_regret=float(np.median(regrets)),
        top3_regret=float(np.mean(best_of_3)),
        tau=float(np.mean([kendall(pairs[:, 0], pairs[:, 1]) for pairs in sizes])),
    )


def regret(
    predicted: NDArray[np.float64], measured: NDArray[np.float64], *, picks: int = 1
) -> float:
    """Measured time of the best of the first `picks` choices over the best, less 1."""
    order = np.argsort(predicted, kind="stable")
    if picks > 1:
        return float(measured[order[:picks]].min() / measured.min() - 1)
    tied = np.isclose(predicted, predicted.min(), rtol=1e-9, atol=0)
    return float(measured[tied].mean() / measured.min() - 1)


def kendall(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> float:
    """Kendall's tau-b of two columns; 0 where one of them is constant."""
    upper = np.triu_indices(len(predicted), 1)
    signs = [np.sign(np.subtract.outer(each, each)[upper]) for each in (predicted, measured)]
    # tau-b: a pair that is tied in one column does not count in the norm of that column.
    norm = np.sqrt(np.prod([np.sum(sign != 0) for sign in signs], dtype=float))
    return float(np.sum(signs[0] * signs[1]) / norm) if norm else 0.0
