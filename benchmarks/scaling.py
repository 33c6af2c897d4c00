"""Processor seconds of a search against the layers of a model and against GPUs; the plot of them.

Llama-3-70B, made deeper or shallower, on H100s with two samples of 4,096 tokens per GPU. Printed:
a row per search, and the exponent p of seconds ~ x**p, fitted to all rows and to the larger half.

    python benchmarks/scaling.py [--plot docs/images/scaling.png]
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.figure import Figure
from paper_models import machine, prepared

from mist.plans.search_space import SPACES
from mist.search.tune import tune
from mist.symbolic.load_programs import quiet
from mist.workflow.request import Question

NAMES: Final = ("paper", "plain", "whole")
LAYERS: Final = (20, 40, 80, 160, 320)
GPUS: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
USUAL_LAYERS, USUAL_GPUS = 80, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A search: its space, layers and GPUs."""

    space: str
    num_layers: int
    num_gpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What a search took: processor seconds, and stages priced."""

    cpu_s: float
    num_stages: int


def spent(size: Size) -> Spent:
    """Search once."""
    asked = Question(
        model="llama3-70b", num_gpus=size.num_gpus, seq_len=4096, global_batch=2 * size.num_gpus
    )
    job, limits = prepared(asked, size.num_layers)
    start = time.process_time()
    found = tune(
        job, SPACES[size.space], limits=limits, num_alternatives=0, progress=quiet, method="dp"
    )
    cpu_s = time.process_time() - start
    return Spent(cpu_s=cpu_s, num_stages=found.statistics["stages_evaluated"])


def sweeps(space: str) -> dict[str, list[Size]]:
    """Sizes by what varies."""
    return {
        "layers": [Size(space=space, num_layers=n, num_gpus=USUAL_GPUS) for n in LAYERS],
        "GPUs": [Size(space=space, num_layers=USUAL_LAYERS, num_gpus=n) for n in GPUS],
    }


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """p of y ~ x**p: the slope of the logarithms, by least squares."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def rows(found: dict[Size, Spent]) -> Iterator[str]:
    """The table, and the exponents below it."""
    yield f"{'space':<6} {'layers':>6} {'GPUs':>5} {'cpu_s':>7} {'stages':>12}"
    for size, cost in found.items():
        yield (
            f"{size.space:<6} {size.num_layers:6} {size.num_gpus:5} {cost.cpu_s:7.2f} "
            f"{cost.num_stages:12}"
        )
    for space in NAMES:
        for what, sizes in sweeps(space).items():
            x, y = values(what), [found[size].cpu_s for size in sizes]
            half = len(x) // 2
            yield (
                f"{space:<6} seconds ~ {what}**{exponent(x, y):.2f}, "
                f"the larger half {what}**{exponent(x[half:], y[half:]):.2f}"
            )


def values(what: str) -> tuple[int, ...]:
    """What a sweep varies."""
    return LAYERS if what == "layers" else GPUS


def plot(found: dict[Size, Spent], path: Path) -> None:
    """Seconds against layers and against GPUs, beside what would be linear and log-linear."""
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    for what, axes in zip(("layers", "GPUs"), figure.subplots(1, 2, sharey=True), strict=True):
        x = np.array(values(what), dtype=float)
        for space in NAMES:
            y = [found[size].cpu_s for size in sweeps(space)[what]]
            axes.loglog(x, y, marker="o", label=f"{space}: {what}^{exponent(x, y):.2f}")
        bar = x if what == "layers" else x * np.log(x)
        y0 = found[sweeps("plain")[what][0]].cpu_s
        label = "linear" if what == "layers" else "log-linear, N log N"
        axes.loglog(x, y0 * bar / bar[0], ":", color="0.5", label=label)
        axes.set(xlabel=what, xticks=x, xticklabels=[f"{n:.0f}" for n in x])
        axes.minorticks_off()
        axes.legend(fontsize="small")
    figure.axes[0].set_ylabel("processor time of a search [s]")
    figure.savefig(path, dpi=90, metadata={"Software": None})


def main() -> None:
    """Print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path, help="a PNG to write")
    path = parser.parse_args().plot
    print(machine(), flush=True)
    sizes = [size for space in NAMES for own in sweeps(space).values() for size in own]
    found = {size: spent(size) for size in sizes}
    print("\n".join(rows(found)))
    if path is not None:
        plot(found, path)


if __name__ == "__main__":
    main()
