"""Step times from logs that frameworks write: a line of text a step, a table, a Trainer's state.

A row of `FORMATS` says how one framework writes what a step took; the first that a file has lines
of is its format. Where a framework writes tokens per second and GPU instead, the layout says how
many tokens a step has.

    torchtitan  step: 10  loss: 7.1  memory: 42.3GiB(44%)  tps: 5,233  tflops: 302  mfu: 30.5%
    megatron    iteration 10/ 100 | ... | elapsed time per iteration (ms): 1234.5 | ...
    nanotron    iteration: 10 / 100 | ... | elapsed_time_per_iteration_ms: 1.23K | ...
"""

import csv
import io
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

ANSI: Final = re.compile(r"\x1b\[[0-9;]*m")  # torchtitan colours its lines
NUMBER: Final = r"([0-9][0-9,]*\.?[0-9]*(?:[eE][-+]?[0-9]+)?)([KMB]?)"
SUFFIXES: Final = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9}
# Columns of tables, and how many of their unit a second has.
COLUMNS: Final = {
    "seconds": 1.0, "step_time_s": 1.0, "step_s": 1.0, "step_time": 1.0, "step_time_ms": 1e3,
    "ms": 1e3, "time_s": 1.0, "elapsed_ms": 1e3, "iteration_time_ms": 1e3, "duration": 1.0,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LogFormat:
    """How a framework writes a step.

    `pattern`: with a number, and K, M or B behind it, as its groups. `seconds`: of a step from that
    number and the tokens that each GPU has in a step.
    """

    name: str
    pattern: re.Pattern[str]
    seconds: Callable[[float, float], float]


def _milliseconds(number: float, _: float) -> float:
    return number / 1e3


FORMATS: Final = (
    LogFormat(
        name="Megatron-LM",
        pattern=re.compile(rf"elapsed time per iteration \(ms\): *{NUMBER}"),
        seconds=_milliseconds,
    ),
    LogFormat(
        name="nanotron",
        pattern=re.compile(rf"elapsed_time_per_iteration_ms: *{NUMBER}"),
        seconds=_milliseconds,
    ),
    LogFormat(
        # Of one GPU: torchtitan divides by the ranks that share a sample.
        name="torchtitan",
        pattern=re.compile(rf"step: *\d+ .*\btps: *{NUMBER}"),
        seconds=lambda rate, tokens: tokens / rate,
    ),
)


def seconds_in(text: str, tokens_per_gpu: float) -> list[float]:
    """Seconds of each step that a log of any known format has; none where it has no such line.

    `tokens_per_gpu`: tokens of a step over GPUs. Raises ValueError for a number that is no time.
    """
    return _of_lines(text, tokens_per_gpu) or _of_table(text)


def _of_lines(text: str, tokens_per_gpu: float) -> list[float]:
    plain = ANSI.sub("", text)
    for each in FORMATS:
        numbers = [_number(*found) for found in each.pattern.findall(plain)]
        if numbers:
            return [each.seconds(number, tokens_per_gpu) for number in numbers]
    return []


def _number(digits: str, suffix: str) -> float:
    number = float(digits.replace(",", "")) * SUFFIXES[suffix]
    if not 0 < number < math.inf:
        raise ValueError(f"{digits}{suffix} for a step")
    return number


def mean_step_s(data: Mapping[str, Any]) -> float:
    """The mean step of a Hugging Face Trainer's state or results, which keep no single ones.

    0 where they do not say it. Raises ValueError and TypeError for what is no number.
    """
    history = data.get("log_history", [])
    rows = [data, *history] if isinstance(history, list) else [data]
    for row in rows:
        if not isinstance(row, dict) or "train_runtime" not in row:
            continue
        if steps := row.get("step") or data.get("global_step"):
            return float(row["train_runtime"]) / float(steps)
        if rate := row.get("train_steps_per_second"):
            return 1 / float(rate)
    return 0.0


def _of_table(text: str) -> list[float]:
    """A column of times under a name of `COLUMNS`, or one number a line."""
    rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    names = [cell.strip().lower() for cell in rows[0]] if rows else []
    place = next((i for i, name in enumerate(names) if name in COLUMNS), None)
    if place is None:
        return [_number(row[0].strip(), "") for row in rows] if _is_bare(rows) else []
    cells = [row[place].strip() for row in rows[1:] if len(row) > place]
    return [_number(cell, "") / COLUMNS[names[place]] for cell in cells if cell]


def _is_bare(rows: list[list[str]]) -> bool:
    return bool(rows) and all(re.fullmatch(NUMBER, row[0].strip()) for row in rows)
