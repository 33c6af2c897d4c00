"""Steps of many published runs at once, as functions of the constants of each.

Rows are runs, columns the constants of `PATHS`; what a run does not depend on changes nothing.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from step_slopes import GRID, PATHS

from mist.validate.measured_runs import Run, read_runs

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
STEP = 0.03  # of a logarithm, for slopes


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """How steps of some runs change with one constant: `ratios` of the base's at `at`, [M, 5]."""

    column: int
    runs: Counts
    at: Floats
    ratios: Floats

    def ratio(self, values: Floats) -> Floats:
        """Straight between the points, and on beyond them: a time grows evenly with its scale."""
        row = np.arange(len(self.runs))
        last = self.at.shape[1] - 2
        below = np.clip(np.sum(values[:, None] > self.at, axis=1) - 1, 0, last)
        low, high = self.at[row, below], self.at[row, below + 1]
        rise = self.ratios[row, below + 1] - self.ratios[row, below]
        return self.ratios[row, below] + rise * (values - low) / (high - low)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """N runs; `log_s` [N, speeds, networks, hops]: logarithms of their steps on the grid."""

    runs: tuple[Run, ...]
    runtimes: tuple[str, ...]
    devices: tuple[str, ...]
    log_s: Floats
    base_s: Floats
    profiles: tuple[Profile, ...]

    @property
    def measured_s(self) -> Floats:
        """Measured seconds of a step."""
        return np.array([run.step_time_s for run in self.runs])

    @property
    def sources(self) -> NDArray[np.str_]:
        """The source of each run."""
        return np.array([run.source for run in self.runs])

    def errors(self, values: Floats) -> Floats:
        """log(predicted / measured) of each run at constants [N, P]."""
        grid_s = np.exp(_on_grid(self.log_s, values))
        more_s = np.zeros(len(values))
        for each in self.profiles:
            # Seconds that a constant adds do not grow with the others: sums, not products.
            ratio = each.ratio(values[each.runs, each.column])
            more_s[each.runs] += (ratio - 1.0) * self.base_s[each.runs]
        return np.log(np.maximum(grid_s + more_s, 0.05 * grid_s) / self.measured_s)

    def slopes(self, values: Floats, errors: Floats) -> Floats:
        """How each run's error changes with the logarithm of each constant, [N, P]."""
        found, total_s = np.zeros_like(values), np.exp(errors) * self.measured_s
        for name in GRID:
            moved, column = values.copy(), PATHS.index(name)
            moved[:, column] *= np.exp(STEP)
            found[:, column] = (self.errors(moved) - errors) / STEP
        for each in self.profiles:
            known = values[each.runs, each.column]
            rise = (each.ratio(known * np.exp(STEP)) - each.ratio(known)) / STEP
            found[each.runs, each.column] += rise * self.base_s[each.runs] / total_s[each.runs]
        return found

    def only(self, rows: Counts) -> "StepTimes":
        """The runs of these rows."""
        place = np.full(len(self.runs), -1)
        place[rows] = np.arange(len(rows))
        profiles = []
        for each in self.profiles:
            kept = place[each.runs] >= 0
            if kept.any():
                profiles.append(
                    Profile(column=each.column, runs=place[each.runs][kept],
                            at=each.at[kept], ratios=each.ratios[kept])
                )  # fmt: skip
        return StepTimes(
            runs=tuple(self.runs[i] for i in rows),
            runtimes=tuple(self.runtimes[i] for i in rows),
            devices=tuple(self.devices[i] for i in rows),
            log_s=self.log_s[rows],
            base_s=self.base_s[rows],
            profiles=tuple(profiles),
        )


def _on_grid(log_s: Floats, values: Floats) -> Floats:
    """Logarithms of steps between the points of the grid, straight in the logarithms."""
    below, share = [], []
    for name, grid in GRID.items():
        known = np.log(values[:, PATHS.index(name)])
        at = np.interp(known, np.log(grid), np.arange(len(grid)))
        low = np.minimum(at.astype(int), len(grid) - 2)
        below.append(low)
        share.append(at - low)
    total, row = np.zeros(len(values)), np.arange(len(values))
    for corner in itertools.product((0, 1), repeat=len(GRID)):
        weight = np.prod([s if c else 1 - s for s, c in zip(share, corner, strict=True)], axis=0)
        index = tuple(low + c for low, c in zip(below, corner, strict=True))
        total += weight * log_s[(row, *index)]
    return total


def read_steps(runs_path: Path, slopes_path: Path) -> StepTimes:
    """What `step_slopes` wrote of the runs of a file."""
    known = {run.run_id: run for run in read_runs(runs_path)}
    rows = [json.loads(line) for line in slopes_path.read_text().splitlines()]
    shape = (len(rows), *map(len, GRID.values()))
    log_s = np.empty(shape)
    for i, row in enumerate(rows):
        log_s[i] = np.broadcast_to(np.array(row["log_s"]), shape[1:])
    base = np.array([[row["base"].get(name, 1.0) for name in PATHS] for row in rows])
    return StepTimes(
        runs=tuple(known[row["run_id"]] for row in rows),
        runtimes=tuple(row["runtime"] for row in rows),
        devices=tuple(row["device"] for row in rows),
        log_s=log_s,
        base_s=np.exp(_on_grid(log_s, base)),
        profiles=tuple(_profiles(rows)),
    )


def _profiles(rows: Sequence[dict]) -> list[Profile]:
    found = []
    for column, name in enumerate(PATHS):
        own = [i for i, row in enumerate(rows) if name in row["profiles"]]
        if own:
            at, ratios = (np.array([rows[i]["profiles"][name][k] for i in own]) for k in (0, 1))
            found.append(Profile(column=column, runs=np.array(own), at=at, ratios=ratios))
    return found
