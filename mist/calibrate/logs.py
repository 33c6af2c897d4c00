"""What a run's log says, as `mist apply` writes it and as anyone may write it by hand.

{"steps": [{"step": 1, "seconds": 0.9, "stages": [{"forward_s": 0.2, ...}, ...], ...}, ...],
 "stages": [{"peak_bytes": 123, "collectives": [{"axis": "dp", "kind": ..}, ...]}, ...]} as JSON;
only the seconds of the steps must be there. Steps up to "resumed_after" are not looked at: the run
that this one goes on from may have had another layout. Logs of other frameworks:
`mist.calibrate.text_logs`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final

from mist.calibrate.text_logs import mean_step_s, seconds_in
from mist.documents import read_json, read_text
from mist.errors import InputError
from mist.units import LARGEST_INTEGER

SHORTEST_S: Final = 1e-9  # of a step: no clock tells less
LONGEST_S: Final = 1e9  # thirty years
WARM_UP: Final = 2  # steps that compile, allocate and connect; left out where there are enough


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveRow:
    """`count` collectives of one kind along one axis in one step, `num_bytes` together."""

    axis: str
    kind: str
    count: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRow:
    """What was measured of one pipeline stage in one step; `peak_bytes` of its fullest rank."""

    peak_bytes: int
    collectives: tuple[CollectiveRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageParts:
    """Seconds of a stage in a step, each the median of the steps that count.

    Passes include the collectives that they wait for; `sums_s`: shared gradients, norm and loss.
    """

    forward_s: float
    backward_s: float
    sums_s: float
    optimizer_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedRun:
    """Seconds of the steps that count, and the stages and their parts where the log has them."""

    seconds: tuple[float, ...]
    stages: tuple[StageRow, ...]
    parts: tuple[StageParts, ...] = ()

    @property
    def step_s(self) -> float:
        """The median step."""
        return median(self.seconds)

    @property
    def spread_ratio(self) -> float:
        """Half of the range of the middle half of the steps, over the median; 0 for one step."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.step_s


def read_log(path: Path, tokens_per_gpu: float = math.nan) -> LoggedRun:
    """A log without its first two steps, and without those that were watched, where others are.

    `tokens_per_gpu`: tokens of a step over GPUs, for logs that have tokens per second instead of
    seconds. Raises InputError for a file that is no log.
    """
    text = read_text(path)
    try:
        run = _of_json(path) if text.lstrip().startswith("{") else _of_text(text, tokens_per_gpu)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        words = f" ({error})" if isinstance(error, ValueError) else ""
        raise InputError(
            f"{path} is no log of a run{words}: "
            'expected {"steps": [{"seconds": 1.5}, ...]} as JSON, a Trainer\'s state, a table with '
            "a column step_time_s, or the text of torchtitan, Megatron-LM or nanotron."
        ) from error
    if not run.seconds or min(run.seconds) < SHORTEST_S:
        raise InputError(f"{path} has no steps with seconds above 0.")
    return run


def _of_json(path: Path) -> LoggedRun:
    data: Any = read_json(path)
    if "steps" not in data and (mean_s := mean_step_s(data)):
        return LoggedRun(seconds=(_seconds(mean_s),), stages=())
    after = _count(data.get("resumed_after", 0))
    rows = [row for row in data["steps"] if not after or _count(row["step"]) > after]
    steps = _counted([(_seconds(row["seconds"]), row) for row in rows])
    return LoggedRun(
        seconds=tuple(seconds for seconds, _ in steps),
        stages=tuple(_stage(row) for row in data.get("stages", ())),
        parts=_parts([row for _, row in steps]),
    )


def _of_text(text: str, tokens_per_gpu: float) -> LoggedRun:
    steps: list[Step] = [(_seconds(each), {}) for each in seconds_in(text, tokens_per_gpu)]
    if not steps:
        raise KeyError("steps")
    return LoggedRun(seconds=tuple(seconds for seconds, _ in _counted(steps)), stages=())


Step = tuple[float, Mapping[str, Any]]


def _counted(steps: list[Step]) -> list[Step]:
    # Short runs keep their warm-up steps: a rough median is better than none.
    late = steps[WARM_UP:] if len(steps) > 2 * WARM_UP else steps
    # Steps under a recorder are slower, unless all of them are.
    return [step for step in late if not step[1].get("measured")] or late


def _parts(rows: list[Mapping[str, Any]]) -> tuple[StageParts, ...]:
    """Medians of each stage, where all of these steps have them."""
    steps = [row.get("stages", ()) for row in rows]
    names = [item.name for item in fields(StageParts)]
    return tuple(
        StageParts(**{name: median(_seconds(row[name]) for row in stage) for name in names})
        for stage in zip(*steps, strict=True)
    )


def _seconds(value: object) -> float:
    """A time of a log. Raises ValueError for a number that no run takes."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError("seconds are no number")
    seconds = float(value)
    if not 0 <= seconds <= LONGEST_S:
        raise ValueError(f"{value} seconds")
    return seconds


def _count(value: object, *, least: int = 0) -> int:
    """A whole number of a log, of at least `least`. Raises ValueError."""
    count = int(str(value))
    if not least <= count <= LARGEST_INTEGER:
        raise ValueError(f"{value} where {least} is the least")
    return count


def _stage(row: Mapping[str, object]) -> StageRow:
    collectives = row.get("collectives", ())
    if not isinstance(collectives, list | tuple):
        raise TypeError("collectives is no list")
    return StageRow(
        peak_bytes=_count(row["peak_bytes"], least=1),
        collectives=tuple(
            CollectiveRow(
                axis=str(each["axis"]),
                kind=str(each["kind"]),
                count=_count(each["count"]),
                num_bytes=_count(each["bytes"]),
            )
            for each in collectives
        ),
    )
