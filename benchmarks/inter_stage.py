"""Seconds that the inter-stage solvers take on dense synthetic frontiers, on one thread.

Denser and harder than cells of real models (tens of points per cell, not 8.6 on average). "dp" is
exact; "bar_s" is what it must stay below, "MiB" what it holds at its peak. "confirm" is HiGHS at
the bottleneck that the dynamic program found, what `method="both"` adds; "milp" is HiGHS on the
whole problem, run only with --milp, and only on sizes where it takes less than minutes. Units:
those of non-uniform meshes; "a": a stage begins at a multiple of its own.

    python benchmarks/inter_stage.py [--milp] [--repeat 3]
"""

import argparse
import math
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from paper_models import machine

from mist.milp import Cell, InterStageProblem, InterStageSolution, solve
from mist.milp.integer_program import solve_milp


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Layers L, stages S, micro-batches G, points per cell, layer counts within `window` of L/S.

    `num_units`: a stage takes 1, 2 or 4 of so many units of devices; `aligned`: and begins at a
    multiple of them. `named`: every cell names its first layer, each with its own frontier.
    `bar_s`: processor seconds that the dynamic program may take. `milp`: the whole program is worth
    a try.
    """

    num_layers: int
    num_stages: int
    num_micro_batches: int
    num_points: int
    window: int
    num_units: int | None = None
    aligned: bool = False
    bar_s: float | None = None
    named: bool = False
    milp: bool = False


SIZES = [
    Size(num_layers=24, num_stages=4, num_micro_batches=64, num_points=60, window=4, milp=True),
    Size(num_layers=32, num_stages=8, num_micro_batches=64, num_points=60, window=4, milp=True),
    Size(num_layers=80, num_stages=16, num_micro_batches=1, num_points=60, window=4),
    Size(num_layers=80, num_stages=16, num_micro_batches=4, num_points=60, window=4),
    Size(
        num_layers=80, num_stages=16, num_micro_batches=64, num_points=60, window=4, bar_s=0.2
    ),
    Size(num_layers=126, num_stages=32, num_micro_batches=64, num_points=30, window=3),
    Size(
        num_layers=126, num_stages=63, num_micro_batches=64, num_points=30, window=2, bar_s=0.4
    ),
    Size(num_layers=126, num_stages=16, num_micro_batches=64, num_points=60, window=12),
    Size(
        num_layers=24, num_stages=4, num_micro_batches=16, num_points=10, window=2,
        named=True, milp=True,
    ),
    Size(num_layers=80, num_stages=16, num_micro_batches=64, num_points=10, window=2, named=True),
    Size(
        num_layers=80, num_stages=16, num_micro_batches=64, num_points=20, window=3, num_units=32
    ),
    Size(
        num_layers=126, num_stages=64, num_micro_batches=1, num_points=10, window=2,
        num_units=128, bar_s=8.0,
    ),
    Size(
        num_layers=126, num_stages=64, num_micro_batches=64, num_points=10, window=2,
        num_units=128, bar_s=8.0,
    ),
    Size(
        num_layers=126, num_stages=64, num_micro_batches=64, num_points=10, window=2,
        num_units=128, aligned=True, bar_s=8.0,
    ),
]  # fmt: skip


def build(size: Size) -> InterStageProblem:
    """Random frontiers: n layers take n to 1.5 n seconds, and a lone micro-batch 1.2 n to 2.7 n.

    On m units they take 1 / m**0.9 of that: devices gain less than they cost.
    """
    rng = np.random.default_rng(0)
    even = size.num_layers // size.num_stages
    counts = range(max(1, even - size.window), even + size.window + 1)
    cells = [
        Cell(
            stage=stage,
            first=first,
            count=count,
            units=units,
            offsets=tuple(range(0, size.num_units or 0, units)) if size.aligned else None,
            stable_s=np.sort(count / units**0.9 * rng.uniform(1.0, 1.5, size.num_points)),
            lone_s=np.sort(count / units**0.9 * rng.uniform(1.2, 2.7, size.num_points))[::-1],
        )
        for stage in range(size.num_stages)
        for count in counts
        for units in ((1, 2, 4) if size.num_units else (1,))
        for first in (range(size.num_layers - count + 1) if size.named else [None])
    ]
    return InterStageProblem(
        num_layers=size.num_layers,
        num_stages=size.num_stages,
        num_micro_batches=size.num_micro_batches,
        num_units=size.num_units,
        cells=tuple(cells),
    )


def peak_mib(run: Callable[[], object]) -> float:
    """The most memory that a run holds at once, in MiB."""
    tracemalloc.start()
    run()
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak_bytes / 2**20


def timed(
    run: Callable[[], InterStageSolution | None], repeat: int
) -> tuple[float, InterStageSolution]:
    """Least processor seconds of `repeat` runs, and the solution."""
    best_s = math.inf
    for _ in range(repeat):
        start = time.process_time()
        solution = run()
        best_s = min(best_s, time.process_time() - start)
    assert solution is not None
    return best_s, solution


def row(size: Size, *, repeat: int, milp: bool) -> str:
    """One line of the table; the solvers must agree."""
    problem = build(size)
    dp_s, exact = timed(lambda: solve(problem, method="dp"), repeat)
    dp_mib = peak_mib(lambda: solve(problem, method="dp"))
    confirm_s, confirmed = timed(lambda: solve_milp(problem, confirm=exact), 1)
    assert math.isclose(confirmed.step_s, exact.step_s, rel_tol=1e-6)
    whole = "-"
    if milp and size.milp:
        whole_s, found = timed(lambda: solve(problem, method="milp"), 1)
        assert math.isclose(found.step_s, exact.step_s, rel_tol=1e-6)
        whole = f"{whole_s:.2f}"
    num_points = sum(cell.stable_s.size for cell in problem.cells)
    layers = "named" if size.named else "alike"
    units = f"{size.num_units or '-'}{'a' if size.aligned else ''}"
    return (
        f"{size.num_layers:6} {size.num_stages:6} {size.num_micro_batches:4} {layers:>6} "
        f"{units:>6} {num_points:7} {dp_s:8.3f} {size.bar_s or '-':>6} {dp_mib:6.1f} "
        f"{exact.num_nodes:9} {confirm_s:10.3f} {confirmed.gap:8.1e} {whole:>7}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--milp", action="store_true", help="also HiGHS on the whole problem")
    parser.add_argument("--repeat", type=int, default=3, help="runs of dp; the least counts")
    options = parser.parse_args()
    print(machine())
    print(
        "layers stages    G  cells  units  points     dp_s  bar_s    MiB scenarios  confirm_s"
        "      gap  milp_s"
    )
    for size in SIZES:
        print(row(size, repeat=options.repeat, milp=options.milp), flush=True)


if __name__ == "__main__":
    main()
