"""Measured runs from a CSV file: one configuration a row, with what was measured of it."""

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Final, TypeVar, cast, get_args

from mist.documents import read_text
from mist.errors import InputError

MOST: Final = 1e15  # of anything in a row: beyond it sums of counts are not exact
LEAST: Final = 1e-15  # of anything that is not 0: below it ratios overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One row; None is unknown, never "none", and so is a size of 0.

    Names and meanings are those of the columns.
    `micro_batch` is per data-parallel rank, in samples; `peak_memory_gib` in GiB; `outcome` ok,
    oom, crashed_or_oom or crashed_flaky; runs of one `ranking_group` differ in the layout only.
    `notes`: what the source says besides, in words.
    """

    run_id: str
    source: str
    model: str = ""
    arch: str = ""
    task: str = ""
    tier: str = ""
    outcome: str = ""
    ranking_group: str = ""
    params_b: float | None = None
    n_layers: int | None = None
    hidden: int | None = None
    n_heads: int | None = None
    n_kv_heads: int | None = None
    ffn_hidden: int | None = None
    vocab: int | None = None
    seq_len: int | None = None
    gpu: str = ""
    n_gpus: int | None = None
    dp: int | None = None
    tp: int | None = None
    pp: int | None = None
    vpp: int | None = None
    cp: int | None = None
    ep: int | None = None
    zero_or_fsdp: str = ""
    micro_batch: int | None = None
    global_batch: int | None = None
    grad_accum: int | None = None
    activation_ckpt: str = ""
    precision: str = ""
    compile: str = ""
    attention_impl: str = ""
    step_time_s: float | None = None
    mfu: float | None = None
    hfu: float | None = None
    peak_memory_gib: float | None = None
    notes: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRun:
    """One pipeline stage of a run with unequal stages, and its measured peak (MB of 2^20 bytes)."""

    run_id: str
    stage: int
    layers: int
    checkpointed_layers: int
    peak_allocated_mb: float | None = None


Stages = Mapping[str, tuple[StageRun, ...]]
Row = TypeVar("Row", Run, StageRun)


def read_runs(path: Path) -> tuple[Run, ...]:
    """The rows of a file.

    Raises InputError when it cannot be read, lacks run_id or source or any run, names a run twice,
    or has a number that is none.
    """
    runs = _read(path, Run)
    if not runs:
        raise InputError(f"{path} has no runs: there is nothing below its columns.")
    if twice := sorted(_repeated(run.run_id for run in runs)):
        raise InputError(f"{path} has run {twice[0]} twice.")
    return runs


def read_stages(path: Path) -> Stages:
    """The stages of each run of a file, first first. Raises InputError as `read_runs`."""
    found: dict[str, list[StageRun]] = defaultdict(list)
    for row in _read(path, StageRun):
        found[row.run_id].append(row)
    stages = {name: tuple(sorted(rows, key=lambda r: r.stage)) for name, rows in found.items()}
    for name, rows in stages.items():
        if [row.stage for row in rows] != list(range(len(rows))):
            raise InputError(f"{path}: the stages of run {name} are not 0, 1, 2, ...")
    return stages


def _read(path: Path, shape: type[Row]) -> tuple[Row, ...]:
    needed = [f.name for f in fields(shape) if f.default is MISSING]
    try:
        rows = csv.DictReader(io.StringIO(read_text(path), newline=""))
        absent = [name for name in needed if name not in (rows.fieldnames or ())]
        if absent:
            raise InputError(f"{path} has no column {' or '.join(absent)}.")
        return tuple(_row(path, line, row, shape) for line, row in enumerate(rows, start=2))
    except csv.Error as error:
        raise InputError(f"{path} cannot be read: {error}.") from error


def _repeated(names: Iterable[str]) -> set[str]:
    return {name for name, count in Counter(names).items() if count > 1}


def _row(path: Path, line: int, row: dict[str, str], shape: type[Row]) -> Row:
    values: dict[str, object] = {}
    for item in fields(shape):
        text = (row.get(item.name) or "").strip()
        if item.type is str:
            values[item.name] = text
            continue
        kind = cast(type, item.type if item.default is MISSING else get_args(item.type)[0])
        try:
            values[item.name] = _number(text, kind) if text else item.default
        except ValueError:
            raise InputError(
                f"{path}, line {line}: {item.name} {text:.40} is no number that a run can have."
            ) from None
        if values[item.name] is MISSING:
            raise InputError(f"{path}, line {line}: {item.name} is blank.")
    return shape(**values)  # type: ignore[arg-type]


def _number(text: str, kind: type) -> float:
    """A number of a table, of that type. Raises ValueError for what no run has."""
    number = float(text)
    if not (number == 0 or LEAST <= number <= MOST) or (number % 1 and kind is int):
        raise ValueError(text)
    return int(number) if kind is int else number
