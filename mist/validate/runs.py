"""Measured runs from a CSV file: one configuration a row, with what was measured of it."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

from mist.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One row; None is unknown, never "none". Names and meanings are those of the columns.

    `micro_batch` is per data-parallel rank, in samples; `peak_memory_gib` in GiB; `outcome` ok,
    oom, crashed_or_oom or crashed_flaky; runs of one `ranking_group` differ in the layout only.
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
    peak_memory_gib: float | None = None


def read_runs(path: Path) -> tuple[Run, ...]:
    """The rows of a file.

    Raises InputError when it cannot be read, lacks run_id or source, names a run twice, or has a
    number that is none.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            absent = {"run_id", "source"}.difference(rows.fieldnames or ())
            if absent:
                raise InputError(f"{path} has no column {' or '.join(sorted(absent))}.")
            runs = tuple(_run(path, number, row) for number, row in enumerate(rows, start=2))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    twice = sorted(_repeated(run.run_id for run in runs))
    if twice:
        raise InputError(f"{path} has run {twice[0]} twice.")
    return runs


def _repeated(names: Iterator[str]) -> set[str]:
    known: set[str] = set()
    return {name for name in names if name in known or known.add(name)}  # type: ignore[func-returns-value]


def _run(path: Path, line: int, row: dict[str, str]) -> Run:
    values: dict[str, object] = {}
    for item in fields(Run):
        text = (row.get(item.name) or "").strip()
        if item.type is str:
            values[item.name] = text
            continue
        kind = get_args(item.type)[0]
        try:
            values[item.name] = kind(float(text)) if text else None
        except ValueError:
            raise InputError(f"{path}, line {line}: {item.name} {text!r} is no number.") from None
    return Run(**values)  # type: ignore[arg-type]
