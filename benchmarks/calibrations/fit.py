"""Fits profiles/calibrations: `python benchmarks/calibrations/fit.py RUNS.csv SLOPES.json`.

For developers. One fit over all sources (`hierarchy`), of steps that `step_slopes.py` wrote.
Errors are of runs that were left out of the fit: a whole source, a model, a kind of GPU, a number
of nodes. Writes profiles/calibrations/RUNTIME-DEVICE.yaml and fit.md, a part of docs/accuracy.md.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np
import yaml
from hierarchy import CONSTANTS, Combination, Counts, Floats, Hierarchy, hierarchy_of
from step_slopes import GRID, HOP, MEMORY, NETWORK, PATHS, SAID, SPEED
from step_times import StepTimes, read_steps

from mist.calibrate.fit import Posterior
from mist.platform.calibration import Calibration, calibrated, dump_calibration
from mist.validate.measured_runs import Run
from mist.validate.sources import load_sources

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "profiles/calibrations"
PAGE = Path(__file__).with_suffix(".md")
FEWEST = 4  # runs of a source that counts in averages
NUM_GIVEN = 3  # runs of a source, each given alone
# Standard deviation of what no constant explains.
REST = 0.1
# Few sources say little of the next one: what their middle runs span is widened by as much.
WIDENED = 1.2
DEVICES = ("a100-sxm-40", "a100-sxm-80", "a100-pcie-80", "h100-sxm", "h100-sxm-500w-hbm2e",
           "h100-pcie", "h200", "b200", "gb200", "l4")  # fmt: skip
SHARE = 0.8  # of runs that intervals are to cover


@dataclass(frozen=True)
class Fit:
    """All runs, their effects, and the fit to all of them. Rows behind the runs are of plans."""

    times: StepTimes
    plans: tuple[Combination, ...]

    @cached_property
    def listed(self) -> tuple[str, ...]:
        """Sources that the fit is of: of others nobody said which runtime they ran."""
        return tuple(load_sources().sources)

    @cached_property
    def hierarchy(self) -> Hierarchy:
        times = self.times
        runs = [
            Combination(
                runtime=runtime, device=device, source=run.source, fp8=run.precision == "fp8"
            )
            for run, runtime, device in zip(times.runs, times.runtimes, times.devices, strict=True)
        ]
        return hierarchy_of([*runs, *self.plans])

    @cached_property
    def every(self) -> Counts:
        return np.arange(len(self.times.runs))

    @cached_property
    def whole(self) -> Posterior:
        return self.hierarchy.fit(self.times, self.every, self.listed)

    def without(self, rows: Counts) -> Posterior:
        """The fit to all runs but some."""
        others = np.setdiff1d(self.every, rows)
        return self.hierarchy.fit(self.times, others, self.listed, self.whole.point)

    def errors(self, posterior: Posterior, rows: Counts) -> Floats:
        """log(predicted / measured) of these rows."""
        return self.times.only(rows).errors(self.hierarchy.values(posterior.point, rows))

    def left_out(self, parts: Sequence[str]) -> Floats:
        """The error of every run by a fit without the runs of its part."""
        found, names = np.empty(len(parts)), np.array(parts)
        for name in np.unique(names):
            rows = np.flatnonzero(names == name)
            found[rows] = self.errors(self.without(rows), rows)
        return found

    def one_given(self, source: str) -> Floats:
        """Errors of a source's runs where the fit knows one of them; several take turns."""
        rows = np.flatnonzero(self.times.sources == source)
        found = []
        for given in rows[np.linspace(0, len(rows) - 1, min(NUM_GIVEN, len(rows))).astype(int)]:
            rest = rows[rows != given]
            found.append(self.errors(self.without(rest), rest))
        return np.concatenate(found)

    def spread(self, posterior: Posterior, row: int, rows: Counts) -> float:
        """Standard deviation of the log error of a run of `row`'s combination on a new cluster.

        As much as it takes in the middle run of its runtime, of these rows; of all, where none is.
        """
        runtimes = np.array(self.times.runtimes)
        own = rows[runtimes[rows] == self._runtime(row)]
        rows = own if len(own) else rows
        some = self.times.only(rows)
        values = self.hierarchy.values(posterior.point, rows)
        slopes = some.slopes(values, some.errors(values))
        covariance = self.hierarchy.covariance(posterior, row)
        variances = np.einsum("np,pq,nq->n", slopes, covariance, slopes)
        return float(np.sqrt(np.median(variances) + REST**2))

    def _runtime(self, row: int) -> str:
        num_runs = len(self.times.runs)
        return self.times.runtimes[row] if row < num_runs else self.plans[row - num_runs].runtime


def half(run: Run) -> str:
    """Halves by a hash of the configuration, so that repeats of a run stay together."""
    words = (run.model, run.gpu, run.n_gpus, run.tp, run.zero_or_fsdp, run.micro_batch,
             run.seq_len, run.activation_ckpt, run.compile)  # fmt: skip
    return f"half {sha256(repr(words).encode()).digest()[0] % 2}"


Part = Callable[[Run], str]
PARTS: Mapping[str, Part] = {
    "source": lambda run: run.source,
    "model of a source": lambda run: f"{run.source} {run.model}",
    "GPU": lambda run: run.gpu,
    "half of the configurations": half,
}


def is_core(run: Run) -> bool:
    return run.task in ("", "pretrain") and run.precision != "fp8"


def macro(fit: Fit, found: Floats) -> float:
    """The mean over sources with enough runs of pretraining of their median error, in %."""
    medians = [100 * np.median(np.abs(np.expm1(found[rows]))) for rows in core_rows(fit).values()]
    return float(np.mean(medians))


def core_rows(fit: Fit) -> dict[str, Counts]:
    """Rows of pretraining of each source that has enough of them."""
    core = np.array([is_core(run) for run in fit.times.runs])
    sources = fit.times.sources
    rows = {name: np.flatnonzero((sources == name) & core) for name in np.unique(sources)}
    return {name: own for name, own in rows.items() if len(own) >= FEWEST}


def words(found: Floats) -> str:
    """Median, 90th percentile of the error, and the median with its sign, in %."""
    off = 100 * np.expm1(found)
    size = np.abs(off)
    return f"{np.median(size):.1f} / {np.percentile(size, 90):.1f} ({np.median(off):+.1f})"


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return "\n".join([row(*head), row(*["---"] * len(head)), *(row(*each) for each in rows)])


def spreads(fit: Fit) -> Floats:
    """Of every run the standard deviation that a fit without its source states for it."""
    found = np.empty(len(fit.times.runs))
    for source in np.unique(fit.times.sources):
        rows = np.flatnonzero(fit.times.sources == source)
        posterior = fit.without(rows)
        others = np.setdiff1d(fit.every, rows)
        for device in {fit.times.devices[i] for i in rows}:
            some = [i for i in rows if fit.times.devices[i] == device]
            found[some] = fit.spread(posterior, some[0], others)
    return found


def quantiles(fit: Fit, scores: Floats) -> tuple[float, float]:
    """Ends of the middle of scores: measured over predicted in standard deviations.

    Sources weigh alike, up to the weight of many runs.
    """
    sources = fit.times.sources
    names, counts = np.unique(sources, return_counts=True)
    count = dict(zip(names, counts, strict=True))
    weights = np.array([min(1.0, 8 / count[s]) * (s in fit.listed) for s in sources])
    order = np.argsort(scores)
    share = np.cumsum(weights[order]) / weights.sum()
    tail = (1 - SHARE) / 2
    low, high = (float(scores[order][np.searchsorted(share, at)]) for at in (tail, 1 - tail))
    return WIDENED * low, WIDENED * high


def main(runs_path: Path, slopes_path: Path) -> None:
    plans = tuple(Combination(runtime=r, device=d) for r in SAID for d in DEVICES)
    times = read_steps(runs_path, slopes_path)
    # Stacks that multiply in fp8 have other kernels as well: they say nothing of other runs.
    wide = np.flatnonzero([run.precision != "fp8" for run in times.runs])
    fit = Fit(times.only(wide), plans)
    inside = fit.errors(fit.whole, fit.every)
    outside = {name: fit.left_out([part(run) for run in fit.times.runs])
               for name, part in PARTS.items()}  # fmt: skip
    deviations = spreads(fit)
    ends = quantiles(fit, -outside["source"] / deviations)
    text = page(fit, inside, outside, deviations, ends)
    PAGE.write_text(text)
    print(text)
    write(fit, ends)
    write_ratios(fit, Fit(times, ()))


def page(
    fit: Fit,
    inside: Floats,
    outside: Mapping[str, Floats],
    deviations: Floats,
    ends: tuple[float, float],
) -> str:
    source, times = outside["source"], fit.times
    scores = -source / deviations
    covered = (ends[0] <= scores) & (scores <= ends[1])
    widths = np.exp((ends[1] - ends[0]) * deviations)
    one = {name: fit.one_given(name) for name in core_rows(fit)}
    rows = []
    for name in np.unique(times.sources):
        own = times.sources == name
        rows.append([
            name + ("" if name in fit.listed else " (not in the fit)"), own.sum(),
            words(inside[own]), words(source[own]), words(outside["model of a source"][own]),
            words(one[name]) if name in one else "-",
            f"{np.median(widths[own]):.2f}", f"{covered[own].mean():.0%}",
        ])  # fmt: skip
    head = ("source", "runs", "in-sample", "source left out", "model left out",
            "one run of it known", "width of the interval", "covered")  # fmt: skip
    by_source = table(head, rows)
    ways = [["nothing (in-sample)", len(inside), words(inside), f"{macro(fit, inside):.1f}"]]
    ways += [[name, len(found), words(found), f"{macro(fit, found):.1f}"]
             for name, found in outside.items()]  # fmt: skip
    known = np.mean([100 * np.median(np.abs(np.expm1(each))) for each in one.values()])
    ways.append(["all but one run of a source", sum(map(len, one.values())), "-", f"{known:.1f}"])
    by_way = table(("left out of the fit", "runs", "error: median / p90 (sign), %",
                    "mean of the sources' medians, %"), ways)  # fmt: skip
    macro_covered = np.mean([covered[own].mean() for own in core_rows(fit).values()])
    said = (
        f"{len(CONSTANTS) + 1} constants, {len(fit.hierarchy.effects)} effects. Intervals of runs "
        f"whose source is left out cover {covered.mean():.0%} of runs, {macro_covered:.0%} on the "
        f"average of sources. Their ends differ by a factor of {np.median(widths):.2f} in the "
        f"median run, {np.median([np.median(widths[own]) for own in core_rows(fit).values()]):.2f} "
        "in the median source."
    )
    return "\n\n".join([by_way, by_source, said, transfers(fit, inside, outside)]) + "\n"


def transfers(fit: Fit, inside: Floats, outside: Mapping[str, Floats]) -> str:
    """Runs of one kind, hidden and predicted from the others."""
    runs = fit.times.runs
    rows = []

    def hidden(what: str, holds: Callable[[Run], bool]) -> None:
        own = np.flatnonzero([holds(run) for run in runs])
        rows.append([what, len(own), words(fit.errors(fit.without(own), own))])

    for width in sorted({run.hidden for run in runs if run.source == "vtrain-single"}):
        hidden(
            f"vtrain-single, hidden size {width}",
            lambda run, width=width: (run.source, run.hidden) == ("vtrain-single", width),
        )
    for gpu in sorted({run.gpu for run in runs if run.source == "llm-foundry"}):
        hidden(
            f"llm-foundry, {gpu}",
            lambda run, gpu=gpu: (run.source, run.gpu) == ("llm-foundry", gpu),
        )
    # Of sources that say what they ran: others are taken for torch by a rule.
    torch = np.array([runtime in ("torch", "torchtitan") and run.source in fit.listed
                      for runtime, run in zip(fit.times.runtimes, runs, strict=True)])  # fmt: skip
    halves = outside["half of the configurations"]
    rows.append(["runtimes torch and torchtitan, half of the configurations", torch.sum(),
                 words(halves[torch])])  # fmt: skip
    split = np.array([(run.tp or 1) > 1 for run in runs]) & torch
    alone = np.concatenate([fit.errors(fit.without(np.array([i])), np.array([i]))
                            for i in np.flatnonzero(split)])  # fmt: skip
    rows.append(["of these, tensor parallel, one run at a time", split.sum(), words(alone)])
    return table(("hidden", "runs", "error: median / p90 (sign), %"), rows)


def fp8_ratios(fit: Fit, joint: Fit) -> dict[str, dict[str, dict[str, float]]]:
    """Figures of runs in fp8 over those of the calibrations, by source and device.

    `joint`: a fit that knows these runs as well.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for i, run in enumerate(joint.times.runs):
        if run.precision != "fp8" or run.source not in joint.listed:
            continue
        runtime, device = joint.times.runtimes[i], joint.times.devices[i]
        plan = len(fit.times.runs) + fit.plans.index(Combination(runtime=runtime, device=device))
        over = joint.hierarchy.values(joint.whole.point, np.array([i])) / fit.hierarchy.values(
            fit.whole.point, np.array([plan])
        )
        found.setdefault(run.source, {})[device] = {
            path: float(f"{over[0, PATHS.index(path)]:.4g}") for path in (*GRID, MEMORY)
        }
    return found


def write_ratios(fit: Fit, joint: Fit) -> None:
    """What is of each source alone."""
    effects = dict(zip(fit.hierarchy.effects, fit.whole.point.tolist(), strict=True))
    ratios: dict[str, dict[str, float]] = {}
    for source in sorted({run.source for run in fit.times.runs} & set(fit.listed)):
        own = Combination(runtime="", device="", source=source)
        keys = ((SPEED, "source"), (NETWORK, "cluster"), (HOP, "cluster"))
        ratios[source] = {
            path: float(f"{np.exp(effects[path, level, own.key(level)]):.4g}")
            for path, level in keys
        }
    data = {
        "schema": "mist.source-ratios/1",
        "source": "fitted with all calibrations (benchmarks/calibrations/fit.py)",
        "ratios": ratios,
        "fp8": fp8_ratios(fit, joint),
    }
    text = yaml.safe_dump(data, sort_keys=False, width=1000, default_flow_style=None)
    (ROOT / "profiles/validation/source_ratios.yaml").write_text(
        f"# Written by benchmarks/calibrations/fit.py.\n{text}"
    )


def write(fit: Fit, ends: tuple[float, float]) -> None:
    """A calibration for each runtime on each GPU."""
    num_runs = len(fit.times.runs)
    counted = sum(run.source in fit.listed for run in fit.times.runs)
    for each in FOLDER.glob("*.yaml"):
        each.unlink()
    for i, plan in enumerate(fit.plans):
        row = num_runs + i
        paths = [*GRID, *SAID[plan.runtime]]
        columns = [PATHS.index(path) for path in paths]
        values = fit.hierarchy.values(fit.whole.point, np.array([row]))[0, columns]
        covariance = fit.hierarchy.covariance(fit.whole, row)[np.ix_(columns, columns)]
        spread = fit.spread(fit.whole, row, fit.every)
        low, high = np.exp(np.array(ends) * spread).tolist()
        source = f"fitted to {counted} published runs together (benchmarks/calibrations/fit.py)"
        basis = (
            f"eight of ten runs of sources that were left out of a fit to {counted} published "
            f"runs; of {plan.runtime} on {plan.device} in particular"
        )
        found = Calibration(
            schema="mist.calibration/1",
            runtime=plan.runtime,
            device=plan.device,
            step_low_ratio=calibrated(low, basis),
            step_high_ratio=calibrated(high, basis),
            values={
                path: calibrated(min(value, 1.0) if path == NETWORK else value, source)
                for path, value in zip(paths, values.tolist(), strict=True)
            },
            covariance=tuple(
                tuple(float(f"{x:.3g}") for x in covariance[k, : k + 1]) for k in range(len(paths))
            ),
        )
        text = dump_calibration(found, "Written by benchmarks/calibrations/fit.py.")
        (FOLDER / f"{plan.runtime}-{plan.device}.yaml").write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
