"""Runs with blank columns: what each of them may be, and one prediction from those of all cases.

A blank is unknown, never "none". A column that others decide is filled in. Of any other the row
`CASES` has says which values are usual, the likeliest first. A run is predicted with the likeliest
of all, and with each other value of one column at a time:

    low end = likeliest x product over columns of min over values of (predicted / likeliest)

and so the high end with max; the chance to fit is the mean over the cases.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Final

from mist.plans.memory_levels import PLAIN
from mist.platform.profiles import load_runtime
from mist.platform.runtime import Runtime
from mist.validate.measured_runs import Run
from mist.validate.results import RunPrediction
from mist.validate.sources import Source, Sources

Values = Sequence[int | str]
# Levels as rows write them; of FSDP, so that the rule for sources that no table has still holds.
PARTIAL: Final = "partial"  # some layers run again, and only a table of stages says which
ZERO_WORDS: Final = ("none", "zero1", "fsdp2-zero2", "fsdp2-zero3")
USUAL_TP: Final = (4, 1, 2, 8)  # of a layout that nobody states
MOST_SAMPLES: Final = 8  # of a micro-batch that nobody states


@dataclass(frozen=True, slots=True, kw_only=True)
class FilledRun:
    """A run without blanks; `column`: the one that has another value than the likeliest, if any."""

    run: Run
    column: str = ""


def filled_runs(run: Run, sources: Sources, *, has_stages: bool = False) -> tuple[FilledRun, ...]:
    """The likeliest case of a run first, then the others; the run itself where nothing is blank.

    `has_stages`: the table of stages has its layers, and says how many of them run again.
    """
    if has_stages:
        return (FilledRun(run=run),)
    usual, *rest = _layouts(_decided(run))
    cases = _cases(usual, sources)
    likeliest = _likeliest(usual, cases)
    others = (
        FilledRun(run=_named(likeliest, column, value), column=column)
        for column, values in cases.items()
        for value in values[1:]
    )
    layouts = (
        FilledRun(run=_named(_likeliest(each, _cases(each, sources)), "tp", each.tp), column="tp")
        for each in rest
        if each.tp is not None
    )
    return FilledRun(run=likeliest), *others, *layouts


def _cases(run: Run, sources: Sources) -> dict[str, Values]:
    """The usual values of each blank column."""
    source = sources.of(run)
    return {
        column: values
        for column, values_of in CASES.items()
        if getattr(run, column) in (None, "", 0, PARTIAL)
        and (values := values_of(run, source, _runtime(source.runtime)))
    }


def _likeliest(run: Run, cases: Mapping[str, Values]) -> Run:
    return replace(run, **{column: values[0] for column, values in cases.items()})  # type: ignore[arg-type]


def _layouts(run: Run) -> list[Run]:
    """The usual layouts of a run that gives none, the likeliest first: tp in a node, no stages."""
    if run.dp or run.tp or run.pp or not run.n_gpus:
        return [run]
    degrees = [tp for tp in USUAL_TP if run.n_gpus % tp == 0 and (run.n_heads or tp) % tp == 0]
    return [_decided(replace(run, tp=tp, pp=1)) for tp in degrees]


def joined(run: Run, cases: Sequence[tuple[FilledRun, RunPrediction]]) -> RunPrediction:
    """The prediction of a run from those of its cases, the likeliest first."""
    likeliest = replace(cases[0][1], run=run)
    made = [(case.column, row) for case, row in cases[1:] if row.status == "predicted"]
    if likeliest.status != "predicted" or not made:
        return likeliest

    def end(name: str, pick: Callable[[list[float]], float]) -> float:
        known = getattr(likeliest, name)
        columns = {column for column, _ in made}
        ratios = [
            pick([1.0, *(getattr(row, name) / known for other, row in made if other == column)])
            for column in columns
        ]
        return float(known * prod(ratios))

    chances = [row.fit_probability or 0.0 for _, row in made]
    return replace(
        likeliest,
        reason=_reason(run, cases),
        step_low_s=end("step_low_s", min),
        step_high_s=end("step_high_s", max),
        peak_low_gib=end("peak_low_gib", min),
        peak_high_gib=end("peak_high_gib", max),
        fit_probability=(sum(chances) + (likeliest.fit_probability or 0.0)) / (1 + len(chances)),
    )


def _reason(run: Run, cases: Sequence[tuple[FilledRun, RunPrediction]]) -> str:
    """Which columns are not given, and what is taken for them."""
    first, *others = (case for case, _ in cases)
    words = []
    for column in dict.fromkeys(case.column for case in others):
        values = [getattr(case.run, column) for case in others if case.column == column]
        words.append(f"{column} not given: {getattr(first.run, column)}, or "
                     f"{', '.join(map(str, values))}")  # fmt: skip
    return "; ".join(words)


@cache
def _runtime(name: str) -> Runtime:
    return load_runtime(name).profile


def _named(run: Run, column: str, value: int | str) -> Run:
    return replace(run, run_id=f"{run.run_id} {column}={value}", **{column: value})  # type: ignore[arg-type]


def _decided(run: Run) -> Run:
    """The run with what its other columns decide: dp * tp * pp * cp GPUs, samples of a step."""
    degrees = {name: getattr(run, name) for name in ("dp", "tp", "pp")}
    known = prod(value for value in (*degrees.values(), run.cp) if value)
    blank = [name for name, value in degrees.items() if not value]
    if run.n_gpus and len(blank) == 1 and run.n_gpus % known == 0:
        run = replace(run, **{blank[0]: run.n_gpus // known})
    if not run.micro_batch and run.grad_accum and _rank_samples(run) % run.grad_accum == 0:
        run = replace(run, micro_batch=_rank_samples(run) // run.grad_accum or None)
    return run


def _rank_samples(run: Run) -> int:
    """Samples of a step on each data-parallel rank; 0 where that is not known."""
    return (run.global_batch or 0) // (run.dp or 1)


def _micro_batches(run: Run, _: Source, __: Runtime) -> Values:
    sizes = [2**power for power in range(MOST_SAMPLES.bit_length())]
    return [size for size in sizes if _rank_samples(run) % size == 0]


def _micro_steps(run: Run, _: Source, __: Runtime) -> Values:
    return () if run.global_batch else (1, MOST_SAMPLES)


def _zero_levels(run: Run, source: Source, runtime: Runtime) -> Values:
    if source.zero is not None:
        return ()
    levels = sorted(runtime.knobs.zero_levels, reverse=True)
    return [ZERO_WORDS[level] for level in levels if level == levels[0] or (run.dp or 1) > 1]


def _checkpoints(run: Run, source: Source, runtime: Runtime) -> Values:
    words = [level.value for level in PLAIN if level in runtime.levels]
    if run.activation_ckpt == PARTIAL:
        return words[0], words[-1]
    return () if source.checkpoint else words


def _widths(run: Run, _: Source, __: Runtime) -> Values:
    hidden = run.hidden or 0
    # GPT: four times the hidden size. Gated: two thirds of that in multiples of 256, or Llama-3's.
    gpt = run.arch.startswith(("gpt", "dense-gpt", "dense-bert"))
    return [4 * hidden] if gpt else [-(-8 * hidden // 3 // 256) * 256, 7 * hidden // 2]


def _heads(run: Run, _: Source, __: Runtime) -> Values:
    return [(run.hidden or 0) // size for size in (128, 64) if (run.hidden or 0) % size == 0]


CASES: Final[Mapping[str, Callable[[Run, Source, Runtime], Values]]] = {
    "ffn_hidden": _widths,
    "n_heads": _heads,
    "vocab": lambda *_: (50304, 32000, 128256),  # of GPT-2, Llama-2, Llama-3
    "seq_len": lambda *_: (4096, 2048, 8192),
    "precision": lambda *_: ("bf16",),  # products in fp16 cost the same
    "zero_or_fsdp": _zero_levels,
    "activation_ckpt": _checkpoints,
    "micro_batch": _micro_batches,
    "grad_accum": _micro_steps,
}
