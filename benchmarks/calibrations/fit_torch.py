"""Fits runtime torch to published runs: `python benchmarks/calibrations/fit_torch.py RUNS.csv`.

For developers. One fit over all GPUs: eleven constants, each with what is known of it beforehand
(`CONSTANTS`), whose largest posterior density is sought (`mist.calibrate.fit`). Errors are of runs
that were left out of the fit: a whole source, a model, a kind of GPU, a number of nodes, half of
all configurations. Writes
profiles/calibrations/torch-*.yaml and fit_torch.md, a part of docs/accuracy.md.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch_runs import NETWORK, SPEED, TENSOR, TRAFFIC, TimedRun, timed_runs

from mist.calibrate.fit import Range, fitted
from mist.platform.calibration import Calibration, calibrated, dump_calibration

Floats = NDArray[np.float64]
Values = Mapping[str, float]
ROOT = Path(__file__).parents[2]
PAGE = Path(__file__).with_suffix(".md")

POWER = "power exponent"
AMPERE, HOPPER, BLACKWELL = "Ampere", "Hopper", "Blackwell"
FMS, YANDEX, TITAN = "network of fms-fsdp", "network of YaFSDP", "network of torchtitan"
CLUSTERS = {
    "fms-fsdp": FMS, "fms-fsdp-eager": FMS, "yafsdp-fsdp1": YANDEX,
    "torchtitan": TITAN, "torchtitan-log": TITAN,
}  # fmt: skip
# Start is the mean of what is known beforehand, width the standard deviation of its logarithm.
CONSTANTS = {
    # Tables of single products are bursts; 10 to 30 % is lost under sustained power.
    SPEED: Range(start=1.15, least=0.9, most=2.0, width=0.15),
    # Families differ by what their power limits leave of that.
    # Scales fitted to other runtimes: 1.05 to 1.10 on A100, 1.32 to 1.37 on H100.
    AMPERE: Range(start=1.0, least=0.6, most=1.6, width=0.12),
    HOPPER: Range(start=1.0, least=0.6, most=1.6, width=0.12),
    BLACKWELL: Range(start=1.0, least=0.6, most=1.6, width=0.12),
    # Power goes with the clock to the second or third power, so the clock with power to 1/2 or 1/3.
    POWER: Range(start=0.45, least=0.1, most=1.0, width=0.3),
    # Laws of memory-bound kernels are at the rate of a large copy; those of a layer are smaller.
    TRAFFIC: Range(start=1.15, least=0.5, most=2.6, width=0.2),
    # nanotron's runs on a public cluster reach .38 of line rate; vendors show .85 and more.
    NETWORK: Range(start=0.45, least=0.1, most=1.0, width=0.4),
    # Between .38 and .85 lies a factor of 2.2; a source may also mean another line rate.
    FMS: Range(start=1.0, least=0.25, most=3.0, width=0.5),
    YANDEX: Range(start=1.0, least=0.25, most=3.0, width=0.5),
    TITAN: Range(start=1.0, least=0.25, most=3.0, width=0.5),
    # Published collectives are alone; in a layer DTensor copies, waits and dispatches as well.
    TENSOR: Range(start=1.5, least=1.0, most=4.0, width=0.5),
}
# GPUs of the families that runs are of; others stay uncalibrated.
FAMILIES = {
    "a100-sxm-40": AMPERE, "a100-sxm-80": AMPERE,
    "h100-sxm": HOPPER, "h100-sxm-500w-hbm2e": HOPPER, "h200": HOPPER,
    "b200": BLACKWELL, "gb200": BLACKWELL,
}  # fmt: skip
# Watts of a part whose law is that of one with another limit: the limit over the law's.
POWER_RATIO = {"h100-sxm-500w-hbm2e": 500 / 700}
WIDEST_TAIL, COVERED = 10.0, 0.8  # %; the share of runs that intervals are to cover
NUM_SPLITS = 8
Parted = Mapping[str, Callable[[TimedRun], str]]


def nodes(one: TimedRun) -> str:
    return f"{-(-(one.run.n_gpus or 1) // 8)} nodes"


def half(one: TimedRun, split: int) -> str:
    """Halves by a hash of the configuration, so that repeats of a run stay together."""
    run = one.run
    words = (run.model, run.gpu, run.n_gpus, run.tp, run.zero_or_fsdp, run.micro_batch,
             run.seq_len, run.activation_ckpt, run.compile, split)  # fmt: skip
    return f"half {sha256(repr(words).encode()).digest()[0] % 2}"


PARTS: Parted = {
    "source": lambda one: one.run.source,
    "model": lambda one: one.run.model,
    "GPU": lambda one: one.device,
    "number of nodes": nodes,
}


def values_for(device: str, constants: Values) -> dict[str, float]:
    """Figures of profiles for a device, from the constants of the fit."""
    family = constants.get(FAMILIES.get(device, ""), 1.0)
    slower = POWER_RATIO.get(device, 1.0) ** -constants[POWER]
    own = {SPEED: constants[SPEED] * family * slower}
    return own | {name: constants[name] for name in (TRAFFIC, NETWORK, TENSOR)}


def errors(runs: Sequence[TimedRun], constants: Values) -> Floats:
    """log(predicted / measured) of every run, each on its own cluster."""
    found = []
    for one in runs:
        values = values_for(one.device, constants)
        share = values[NETWORK] * constants.get(CLUSTERS.get(one.run.source, ""), 1.0)
        found.append(one.log_error(values | {NETWORK: min(share, 1.0)}))
    return np.array(found)


def fit(runs: Sequence[TimedRun]) -> dict[str, float]:
    """The constants that fit best."""
    return fitted(lambda values: errors(runs, values), CONSTANTS)[0]


def left_out(runs: Sequence[TimedRun], part: Callable[[TimedRun], str]) -> Floats:
    """The error of every run by a fit without the runs of its part."""
    found = np.empty(len(runs))
    parts = np.array([part(one) for one in runs])
    for name in np.unique(parts):
        rest = [one for one, own in zip(runs, parts, strict=True) if own != name]
        out = np.flatnonzero(parts == name)
        found[out] = errors([runs[i] for i in out], fit(rest))
    return found


def left_halves(runs: Sequence[TimedRun]) -> Floats:
    """Errors by fits without half of the configurations: one split of all runs after another."""
    return np.concatenate([left_out(runs, partial(half, split=i)) for i in range(NUM_SPLITS)])


def interval(found: Floats, tail: float = WIDEST_TAIL) -> tuple[float, float]:
    """Measured over predicted: ends that leave `tail` % of the runs out on each side."""
    low, high = np.percentile(np.exp(-found), (tail, 100 - tail))
    return float(low), float(high)


def coverage(found: Floats, parts: Sequence[str], tail: float = WIDEST_TAIL) -> float:
    """The share of runs in the interval of the errors of all other parts."""
    names, inside = np.array(parts), []
    for name in np.unique(names):
        low, high = interval(found[names != name], tail)
        ratios = np.exp(-found[names == name])
        inside += list((low <= ratios) & (ratios <= high))
    return float(np.mean(inside))


def covering(found: Floats, parts: Sequence[str]) -> float:
    """The tail whose interval covers eight of ten runs of parts that it does not know.

    Few sources say little of the next one: the tail of their own runs is too large for it.
    """
    tails = np.arange(WIDEST_TAIL, 0, -1)
    return next((tail for tail in tails if coverage(found, parts, tail) >= COVERED), tails[-1])


def words(found: Floats) -> tuple[str, str, str]:
    """Median and 90th percentile of the error, and the median with its sign, in %."""
    off = 100 * np.expm1(found)
    size = np.abs(off)
    return f"{np.median(size):.1f}", f"{np.percentile(size, 90):.1f}", f"{np.median(off):+.1f}"


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def table(runs: Sequence[TimedRun], inside: Floats, outside: Mapping[str, Floats]) -> list[str]:
    """Errors of the fit itself and of each way of leaving runs out."""
    lines = [
        row("left out of the fit", "runs", "median error, %", "90th percentile, %", "median with "
            "sign, %", "measured at", "of runs of other parts"),
        row(*["---"] * 7),
    ]  # fmt: skip
    for name, found in {"nothing (in-sample)": inside, **outside}.items():
        names = [PARTS.get(name, PARTS["source"])(one) for one in runs] * (len(found) // len(runs))
        tail = covering(found, names)
        low, high = interval(found, tail)
        covered = f"{coverage(found, names, tail):.0%}"
        span = f"{low:.2f} to {high:.2f} of predicted"
        lines.append(row(name, len(found), *words(found), span, covered))
    return lines


def by_source(runs: Sequence[TimedRun], found: Floats, inside: Floats) -> list[str]:
    """Errors of each source when it is left out, and of the fit with it."""
    lines = [row("source", "runs", "left out: median / p90, %", "sign, %", "in-sample median, %"),
             row(*["---"] * 5)]  # fmt: skip
    names = np.array([one.run.source for one in runs])
    for name in np.unique(names):
        own = names == name
        median, p90, sign = words(found[own])
        lines.append(row(name, own.sum(), f"{median} / {p90}", sign, words(inside[own])[0]))
    return lines


def constants_table(constants: Values) -> list[str]:
    lines = [row("constant", "expected beforehand", "fitted"), row("---", "---", "---")]
    for name, known in CONSTANTS.items():
        before = f"{known.start:g}, a factor of {np.exp(known.width):.2f} either way"
        lines.append(row(name, before, f"{constants[name]:.3g}"))
    return lines


def write(runs: Sequence[TimedRun], constants: Values, outside: Mapping[str, Floats]) -> None:
    """Calibrations of all devices: intervals by runs of other sources, or of other GPUs."""
    for device in FAMILIES:
        # Two kinds of runs say little of Blackwell: it counts as a GPU that no run is of.
        way = "source" if FAMILIES.get(device) in (AMPERE, HOPPER) else "GPU"
        tail = covering(outside[way], [PARTS[way](one) for one in runs])
        low, high = interval(outside[way], tail)
        source = (
            f"eight of ten of {len(runs)} published torch runs, each predicted by a fit without "
            f"its {way}; the median is off by {words(outside[way])[0]} %"
        )
        fitted_to = f"fitted to {len(runs)} published torch runs, {len(CONSTANTS)} constants in all"
        found = Calibration(
            schema="mist.calibration/1",
            runtime="torch",
            device=device,
            step_low_ratio=calibrated(low, source),
            step_high_ratio=calibrated(high, source),
            values={
                name: calibrated(value, fitted_to)
                for name, value in values_for(device, constants).items()
            },
        )
        text = dump_calibration(found, "Written by benchmarks/calibrations/fit_torch.py.")
        (ROOT / f"profiles/calibrations/torch-{device}.yaml").write_text(text)


def main(path: Path) -> None:
    runs = timed_runs(path)
    constants = fit(runs)
    inside = errors(runs, constants)
    outside = {name: left_out(runs, part) for name, part in PARTS.items()}
    outside[f"half of the configurations, {NUM_SPLITS} splits"] = left_halves(runs)
    write(runs, constants, outside)
    parts = (constants_table(constants), table(runs, inside, outside),
             by_source(runs, outside["source"], inside))  # fmt: skip
    text = "\n\n".join("\n".join(lines) for lines in parts)
    PAGE.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
