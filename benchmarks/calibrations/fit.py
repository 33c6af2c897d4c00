"""Fits profiles/calibrations: `python benchmarks/calibrations/fit.py RUNS.csv SLOPES.json`.

For developers. One fit over all sources (`hierarchy`), of steps that `step_slopes.py` wrote.
Errors are of runs that were left out of the fit: a whole source, a model, a kind of GPU, a number
of nodes. Writes profiles/calibrations/RUNTIME-DEVICE.yaml and fit.md, a part of docs/accuracy.md.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np
import yaml
from hierarchy import CONSTANTS, Combination, Counts, Floats, Hierarchy, hierarchy_of
from numpy.typing import NDArray
from step_slopes import GRID, HOP, MEMORY, NETWORK, PATHS, SAID, SPEED
from step_times import StepTimes, read_steps

from mist.calibrate.fit import Posterior
from mist.platform.calibration import Calibration, calibrated, dump_calibration
from mist.platform.step_interval import deviations
from mist.validate.measured_runs import Run
from mist.validate.sources import load_sources

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "profiles/calibrations"
PAGE = Path(__file__).with_suffix(".md")
FEWEST = 4  # runs of a source that counts in averages
NUM_GIVEN = 3  # runs of a source, each given alone
# A source of many runs says no more than this many of what the next source will be off by.
MOST_ALIKE = 8
RESTS = np.arange(0.01, 0.3, 0.005)  # what no constant may explain: standard deviations to try
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

    def without(self, rows: Counts, beside: str = "") -> Posterior:
        """The fit to all runs but some; it begins anew, for the whole fit knows those runs.

        `beside`: a source that counts too, listed or not.
        """
        rest = np.setdiff1d(self.every, rows)
        return self.hierarchy.fit(self.times, rest, (*self.listed, beside))

    def errors(self, posterior: Posterior, rows: Counts) -> Floats:
        """log(predicted / measured) of these rows."""
        return self.times.only(rows).errors(self.hierarchy.values(posterior.point, rows))

    def left_out(self, parts: Sequence[str]) -> Floats:
        """The error of every run by a fit without the runs of its part."""
        return self._by_part(parts, self.errors)

    def known_left_out(self, parts: Sequence[str]) -> Floats:
        """The same of `known`, [2, N]."""
        return self._by_part(parts, self.known)

    def _by_part(self, parts: Sequence[str], of: Callable[[Posterior, Counts], Floats]) -> Floats:
        names = np.array(parts)
        each = [np.flatnonzero(names == name) for name in np.unique(names)]
        found = np.concatenate([of(self.without(rows), rows) for rows in each], axis=-1)
        return found[..., np.argsort(np.concatenate(each))]

    def one_given(self, source: str) -> Floats:
        """Errors of a source's runs where the fit knows one of them; several take turns."""
        rows = np.flatnonzero(self.times.sources == source)
        found = []
        for given in rows[np.linspace(0, len(rows) - 1, min(NUM_GIVEN, len(rows))).astype(int)]:
            rest = rows[rows != given]
            # Given is given: also of a source whose runtime nobody said.
            found.append(self.errors(self.without(rest, beside=source), rest))
        return np.concatenate(found)

    def known(self, posterior: Posterior, rows: Counts) -> Floats:
        """How far off these rows may be for what is not known of their constants, [2, N]."""
        some, values = self.times.only(rows), self.hierarchy.values(posterior.point, rows)
        covariance = np.array([self.hierarchy.covariance(posterior, row) for row in rows])
        widths = np.sqrt(np.einsum("nkk->nk", covariance))

        def moved(sign: int) -> Floats:
            """Logarithms of steps where each constant in turn is a deviation off, [K, N]."""
            factors = np.exp(sign * widths[:, :, None] * np.eye(len(PATHS)))
            return np.array([some.errors(values * factors[:, k]) for k in range(len(PATHS))])

        return np.array(deviations(some.errors(values), moved(-1), moved(1), covariance))

    @property
    def weights(self) -> Floats:
        """How much each run says of runs of other sources."""
        sources = self.times.sources
        names, counts = np.unique(sources, return_counts=True)
        count = dict(zip(names, counts, strict=True))
        return np.array([min(1.0, MOST_ALIKE / count[s]) * (s in self.listed) for s in sources])

    @property
    def stacks(self) -> NDArray[np.str_]:
        """The software of each run."""
        pairs = zip(self.times.runtimes, self.times.devices, strict=True)
        return np.array([Combination(runtime=r, device=d).key("runtime") for r, d in pairs])


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


def macro(fit: Fit, found: Floats) -> tuple[str, str]:
    """The mean over sources with enough runs of pretraining of their median error, in %.

    Of all of them, and of those that the fit is of.
    """
    core = core_rows(fit)
    medians = {name: 100 * np.median(np.abs(np.expm1(found[own]))) for name, own in core.items()}
    inside = [median for name, median in medians.items() if name in fit.listed]
    return f"{np.mean([*medians.values()]):.1f}", f"{np.mean(inside):.1f}"


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


def repeats(fit: Fit, errors: Floats) -> dict[str, float]:
    """By software, how far errors of one configuration lie apart: releases, clusters, luck.

    Standard deviations of logarithms; only where enough runs say it.
    """
    groups: dict[tuple[str, Run], list[float]] = defaultdict(list)
    for stack, run, error in zip(fit.stacks.tolist(), fit.times.runs, errors, strict=True):
        groups[stack, configuration(run)].append(error)
    squares, freedom = defaultdict(float), Counter()
    for (stack, _), each in groups.items():
        squares[stack] += float(np.sum((np.array(each) - np.mean(each)) ** 2))
        freedom[stack] += len(each) - 1
    return {s: float(np.sqrt(squares[s] / n)) for s, n in freedom.items() if n >= FEWEST}


def configuration(run: Run) -> Run:
    """A run without its names and what was measured of it."""
    return replace(run, run_id="", source="", ranking_group="", tier="", outcome="", notes="",
                   step_time_s=None, mfu=None, hfu=None, peak_memory_gib=None)  # fmt: skip


def rests(fit: Fit, errors: Floats, known: Floats) -> dict[str, float]:
    """By software, the standard deviation of what no constant explains of left-out runs.

    The likeliest one of all together, and at least what repeats of one configuration show.
    """

    def surprise(rest: float) -> float:
        """Of a normal distribution of two halves."""
        below, above = np.hypot(known, rest)
        off = errors / np.where(errors > 0, below, above)
        return float(np.sum(fit.weights * (2 * np.log(below + above) + off**2)))

    likeliest, apart = min(RESTS, key=surprise), repeats(fit, errors)
    names = {Combination(runtime=r, device=DEVICES[0]).key("runtime") for r in SAID}
    return {name: float(max(likeliest, apart.get(name, 0.0))) for name in names}


def quantiles(fit: Fit, scores: Floats, rows: Counts) -> tuple[float, float]:
    """Ends of the middle of these rows' scores: measured over predicted in standard deviations.

    The run to come is one more, which may lie beyond all others (conformal prediction: n + 1).
    """
    order = rows[np.argsort(scores[rows])]
    least = (1 + SHARE) / 2 * (fit.weights[rows].sum() + 1)

    def end(order: Counts) -> float:
        return float(scores[order][np.searchsorted(np.cumsum(fit.weights[order]), least)])

    return end(order[::-1]), end(order)


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """Of runs whose source is left out: `covered` [N], `widths` [N]: ratios of the ends.

    The ends of each source come from the others. `ends`: those of all, which ship, in standard
    deviations; `rests`: by software.
    """

    rests: Mapping[str, float]
    ends: tuple[float, float]
    covered: NDArray[np.bool_]
    widths: Floats


def intervals(fit: Fit, errors: Floats) -> Intervals:
    """How often the intervals of left-out runs hold them."""
    known = fit.known_left_out([run.source for run in fit.times.runs])
    rest = rests(fit, errors, known)
    below, above = np.hypot(known, [rest[stack] for stack in fit.stacks])
    scores = -errors / np.where(errors > 0, below, above)
    covered, widths = np.empty(len(errors), bool), np.empty(len(errors))
    for source in np.unique(fit.times.sources):
        own = fit.times.sources == source
        low, high = quantiles(fit, scores, np.flatnonzero(~own))
        covered[own] = (low <= scores[own]) & (scores[own] <= high)
        widths[own] = np.exp(high * above[own] - low * below[own])
    ends = quantiles(fit, scores, fit.every)
    return Intervals(rests=rest, ends=ends, covered=covered, widths=widths)


def wide_fit(times: StepTimes) -> Fit:
    """Of the runs that fits are of: stacks that multiply in fp8 have other kernels as well."""
    plans = tuple(Combination(runtime=r, device=d) for r in SAID for d in DEVICES)
    wide = np.flatnonzero([run.precision != "fp8" for run in times.runs])
    return Fit(times.only(wide), plans)


def main(runs_path: Path, slopes_path: Path) -> None:
    times = read_steps(runs_path, slopes_path)
    fit = wide_fit(times)
    inside = fit.errors(fit.whole, fit.every)
    outside = {name: fit.left_out([part(run) for run in fit.times.runs])
               for name, part in PARTS.items()}  # fmt: skip
    found = intervals(fit, outside["source"])
    text = page(fit, inside, outside, found)
    PAGE.write_text(text)
    print(text)
    write(fit, found)
    write_ratios(fit, Fit(times, ()))


def page(fit: Fit, inside: Floats, outside: Mapping[str, Floats], found: Intervals) -> str:
    source, times = outside["source"], fit.times
    covered, widths = found.covered, found.widths
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
    ways = [["nothing (in-sample)", len(inside), words(inside), *macro(fit, inside)]]
    ways += [[name, len(found), words(found), *macro(fit, found)]
             for name, found in outside.items()]  # fmt: skip
    medians = {name: 100 * np.median(np.abs(np.expm1(each))) for name, each in one.items()}
    known = [f"{np.mean([medians[name] for name in names]):.1f}"
             for names in (one, set(one).intersection(fit.listed))]  # fmt: skip
    ways.append(["all but one run of a source", sum(map(len, one.values())), "-", *known])
    by_way = table(("left out of the fit", "runs", "error: median / p90 (sign), %",
                    "mean of the sources' medians, %", "of sources in the fit"), ways)  # fmt: skip
    macro_covered = np.mean([covered[own].mean() for own in core_rows(fit).values()])
    said = (
        f"{len(CONSTANTS) + 1} constants, {len(fit.hierarchy.effects)} effects. Intervals of runs "
        f"whose source is left out cover {covered.mean():.0%} of runs, {macro_covered:.0%} on the "
        f"average of sources. Their ends differ by a factor of {np.median(widths):.2f} in the "
        f"median run, {np.median([np.median(widths[own]) for own in core_rows(fit).values()]):.2f} "
        "in the median source. What no constant explains: a standard deviation of "
        f"{min(found.rests.values()):.1%}, of runtimes torch and torchtitan "
        f"{found.rests['torch']:.1%}, which is what releases move one configuration by. The ends "
        f"lie {-found.ends[0]:.2f} deviations below and {found.ends[1]:.2f} above the prediction."
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


def write(fit: Fit, found: Intervals) -> None:
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
        source = f"fitted to {counted} published runs together (benchmarks/calibrations/fit.py)"
        basis = (
            f"eight of ten runs of sources that were left out of a fit to {counted} published runs"
        )
        calibration = Calibration(
            schema="mist.calibration/1",
            runtime=plan.runtime,
            device=plan.device,
            rest_deviation=calibrated(found.rests[plan.key("runtime")], basis),
            low_deviations=calibrated(-found.ends[0], basis),
            high_deviations=calibrated(found.ends[1], basis),
            values={
                path: calibrated(min(value, 1.0) if path == NETWORK else value, source)
                for path, value in zip(paths, values.tolist(), strict=True)
            },
            covariance=tuple(
                tuple(float(f"{x:.3g}") for x in covariance[k, : k + 1]) for k in range(len(paths))
            ),
        )
        text = dump_calibration(calibration, "Written by benchmarks/calibrations/fit.py.")
        (FOLDER / f"{plan.runtime}-{plan.device}.yaml").write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
