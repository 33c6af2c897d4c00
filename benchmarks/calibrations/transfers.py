"""How far what one kind of run says reaches: each GPU, width, model and node count hidden in turn.

`python benchmarks/calibrations/transfers.py RUNS.csv SLOPES.json` prints, for every source that has
two or more of a kind, the errors of its runs of each value by a fit without them: the other values
of the source are known to it, and all other sources. Writes transfers.md, which docs/accuracy.md
takes in.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from fit import FEWEST, Fit, table, wide_fit, words
from step_times import read_steps

from mist.validate.measured_runs import Run

PAGE = Path(__file__).with_suffix(".md")
GPUS_PER_NODE = 8
KINDS: Mapping[str, Callable[[Run], object]] = {
    "GPU": lambda run: run.gpu,
    "hidden size": lambda run: run.hidden,
    "model": lambda run: run.model,
    "nodes": lambda run: -(-(run.n_gpus or 1) // GPUS_PER_NODE),
}
HEAD = ("source", "hidden in turn", "values", "runs", "error: median / p90 (sign), %",
        "worst value: median, %")  # fmt: skip


def rows_of(fit: Fit, source: str) -> list[list[object]]:
    """A row for each kind of which the source has two values or more."""
    own = np.flatnonzero(fit.times.sources == source)
    rows: list[list[object]] = []
    for kind, value_of in KINDS.items():
        values = np.array([str(value_of(fit.times.runs[i])) for i in own])
        names = np.unique(values)
        if len(names) < 2:
            continue
        found = {}
        for name in names:
            hidden = own[values == name]
            found[name] = fit.errors(fit.without(hidden), hidden)
        medians = {
            name: 100 * float(np.median(np.abs(np.expm1(each)))) for name, each in found.items()
        }
        worst = max(medians, key=medians.__getitem__)
        every = np.concatenate([*found.values()])
        rows.append(
            [source, kind, len(names), len(own), words(every), f"{worst}: {medians[worst]:.1f}"]
        )
    return rows


def main(runs_path: Path, slopes_path: Path) -> None:
    """Print the table, and write it."""
    fit = wide_fit(read_steps(runs_path, slopes_path))
    names, counts = np.unique(fit.times.sources, return_counts=True)
    sources = [
        name for name, count in zip(names.tolist(), counts, strict=True)
        if count >= FEWEST and name in fit.listed
    ]  # fmt: skip
    text = table(HEAD, [row for source in sources for row in rows_of(fit, source)])
    PAGE.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
