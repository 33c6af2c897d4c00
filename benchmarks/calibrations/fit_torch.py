"""Fits runtime torch to published runs: `python benchmarks/calibrations/fit_torch.py RUNS.csv`.

For developers. One fit over all GPUs: seven constants, each with what is known of it beforehand
(`CONSTANTS`), whose largest posterior density is sought (`mist.calibrate.fit`). Errors are of runs
that were left out of the fit: a whole source, a model, a kind of GPU, a number of nodes, half of
all configurations. Writes
profiles/calibrations/torch-*.yaml and fit_torch.md, a part of docs/accuracy.md.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch_runs import NETWORK, SPEED, TENSOR, TRAFFIC, TimedRun, errors_of, timed_runs

from mist.calibrate.fit import Range, fitted
from mist.platform.calibration import Calibration, calibrated, dump_calibration

Floats = NDArray[np.float64]
Values = Mapping[str, float]
ROOT = Path(__file__).parents[2]
PAGE = Path(__file__).with_suffix(".md")

POWER, AMPERE, HOPPER = "power exponent", "Ampere", "Hopper"
# Start is the mean of what is known beforehand, width the standard deviation of its logarithm.
CONSTANTS = {
    # Tables of single products are bursts; 10 to 30 % is lost under sustained power.
    SPEED: Range(start=1.15, least=0.9, most=2.0, width=0.15),
    # Families differ by what their power limits leave of that.
    AMPERE: Range(start=1.0, least=0.7, most=1.4, width=0.07),
    HOPPER: Range(start=1.0, least=0.7, most=1.4, width=0.07),
    # Power goes with the clock to the second or third power, so the clock with power to 1/2 or 1/3.
    POWER: Range(start=0.45, least=0.1, most=1.0, width=0.3),
    # Laws of memory-bound kernels are at the rate of a large copy; those of a layer are smaller.
    TRAFFIC: Range(start=1.15, least=0.5, most=2.6, width=0.2),
    # Two public clusters reach .30 and .38 of line rate, vendors show .85 and more.
    NETWORK: Range(start=0.45, least=0.1, most=1.0, width=0.4),
    # Published collectives are alone; in a layer DTensor copies, waits and dispatches as well.
    TENSOR: Range(start=1.5, least=1.0, most=4.0, width=0.5),
}
FAMILIES = {
    "a100-sxm-40": AMPERE, "a100-sxm-80": AMPERE, "a100-pcie-80": AMPERE,
    "h100-sxm": HOPPER, "h100-sxm-500w-hbm2e": HOPPER, "h200": HOPPER,
}  # fmt: skip
OTHERS = ("a10g", "b200", "gb200", "h100-pcie", "l4", "l40s", "mi300x", "rtx-4090", "v100-sxm-32")
# Watts of a part whose law is that of one with another limit: the limit over the law's.
POWER_RATIO = {"h100-sxm-500w-hbm2e": 500 / 700}
QUANTILES = (10, 90)
Parted = Mapping[str, Callable[[TimedRun], str]]


def nodes(one: TimedRun) -> str:
    return f"{-(-(one.run.n_gpus or 1) // 8)} nodes"


def half(one: TimedRun) -> str:
    """Halves by a hash of the configuration, so that repeats of a run stay together."""
    run = one.run
    words = (run.model, run.gpu, run.n_gpus, run.tp, run.zero_or_fsdp, run.micro_batch,
             run.seq_len, run.activation_ckpt, run.compile)  # fmt: skip
    return f"half {sha256(repr(words).encode()).digest()[0] % 2}"


PARTS: Parted = {
    "source": lambda one: one.run.source,
    "model": lambda one: one.run.model,
    "GPU": lambda one: one.device,
    "number of nodes": nodes,
    "half of the configurations": half,
}


def values_for(device: str, constants: Values) -> dict[str, float]:
    """Figures of profiles for a device, from the constants of the fit."""
    family = constants.get(FAMILIES.get(device, ""), 1.0)
    slower = POWER_RATIO.get(device, 1.0) ** -constants[POWER]
    own = {SPEED: constants[SPEED] * family * slower}
    return own | {name: constants[name] for name in (TRAFFIC, NETWORK, TENSOR)}


def errors(runs: Sequence[TimedRun], constants: Values) -> Floats:
    """log(predicted / measured) of every run."""
    known = {device: values_for(device, constants) for device in {one.device for one in runs}}
    return errors_of(runs, [known[one.device] for one in runs])


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


def interval(found: Floats) -> tuple[float, float]:
    """Measured over predicted: the ends between which eight of ten runs lie."""
    low, high = np.percentile(np.exp(-found), QUANTILES)
    return float(low), float(high)


def coverage(found: Floats, parts: Sequence[str]) -> float:
    """The share of runs in the interval of the errors of all other parts."""
    names, inside = np.array(parts), []
    for name in np.unique(names):
        low, high = interval(found[names != name])
        ratios = np.exp(-found[names == name])
        inside += list((low <= ratios) & (ratios <= high))
    return float(np.mean(inside))


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
            "sign, %", "eight of ten measured at", "in the interval of the others"),
        row(*["---"] * 7),
    ]  # fmt: skip
    for name, found in {"nothing (in-sample)": inside, **outside}.items():
        low, high = interval(found)
        covered = f"{coverage(found, [*map(PARTS[name], runs)]):.0%}" if name in PARTS else "-"
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
    """Calibrations of all devices: known families by runs of other sources, others by other GPUs."""
    for device in (*FAMILIES, *OTHERS):
        way = "source" if device in FAMILIES else "GPU"
        low, high = interval(outside[way])
        source = (
            f"eight of ten of {len(runs)} published torch runs, each predicted by a fit without "
            f"its {way}"
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
    write(runs, constants, outside)
    parts = (constants_table(constants), table(runs, inside, outside),
             by_source(runs, outside["source"], inside))  # fmt: skip
    text = "\n\n".join("\n".join(lines) for lines in parts)
    PAGE.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
