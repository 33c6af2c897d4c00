"""From a run's columns to the layout that it trained with: what each pipeline stage holds."""

import re
from collections.abc import Sequence
from typing import Final

from mist.model.summary import MOST_LAYERS
from mist.plans.knobs import STAGE_KNOBS
from mist.plans.memory_levels import memory_of
from mist.plans.plan import NOTHING_OFFLOADED, Layout, Offload, Schedule
from mist.plans.schedules import kind_of
from mist.plans.search_space import CHECKPOINTS
from mist.plans.uniform_stages import chunk_shares, uniform_layout
from mist.plans.workload import (
    MOST_GPUS,
    MOST_SAMPLES,
    MOST_TOKENS,
    MemoryLevel,
)
from mist.validate.measured_runs import Run
from mist.validate.run_models import Impossible, Unsupported
from mist.validate.sources import Source

ZERO_LEVELS: Final = (
    ("zero1", 1),
    ("zero2", 2),
    ("zero3", 3),
    ("fsdp", 3),
    ("hsdp", 3),
    ("none", 0),
)
# What rows call the states that they offload.
OFFLOADED: Final = {"opt": "optimizer", "param": "weights", "act": "activations"}
# As the options of plan and check have them; lists are as long as there are layers and stages.
MOST_OF: Final = (
    (MOST_LAYERS, ("n_layers", "vpp")),
    (MOST_GPUS, ("n_gpus", "dp", "tp", "pp", "cp", "ep")),
    (MOST_SAMPLES, ("micro_batch", "global_batch", "grad_accum")),
    (MOST_TOKENS, ("seq_len",)),
)


def layout_of(run: Run, source: Source, layers: Sequence[tuple[int, int]]) -> Layout:
    """The layout of a run; its source stands in where the run does not say.

    `layers`: of each stage, and how many of them run again whole even if the run does not say so.
    Raises Unsupported, naming what is missing or cannot be predicted.
    """
    assert run.dp and run.tp and run.micro_batch
    knobs = {
        **{knob.name: value for knob in STAGE_KNOBS if (value := getattr(run, knob.name, None))},
        "zero": _zero(run.zero_or_fsdp, source.zero),
    }
    level = _level(run.activation_ckpt or source.checkpoint)
    chunks = run.vpp or 1
    return uniform_layout(
        knobs,
        chunk_layers=chunk_shares([count for count, _ in layers], chunks),
        memory=[memory_of(count, level, repeated) for count, repeated in layers],
        num_micro_batches=_num_micro_batches(run),
        schedule=Schedule(kind=kind_of(chunks), vpp=chunks),
        offload=offload_of(f"{run.zero_or_fsdp} {source.offload}"),
        shards_sequence=True,
    )


def check_run(run: Run) -> None:
    """Raise Unsupported, naming what a run does not say or what is not modelled."""
    names = ("dp", "tp", "pp", "micro_batch")
    if absent := [name for name in names if not getattr(run, name)]:
        raise Unsupported(f"{', '.join(absent)} not given")
    _check_sizes(run)
    if (run.ep or 1) > 1:
        raise Unsupported("expert parallelism is not modelled")


def _check_sizes(run: Run) -> None:
    """Refuse what no layout has before lists of that length are made."""
    for most, sizes in MOST_OF:
        for name in sizes:
            if (value := getattr(run, name) or 0) > most:
                raise Unsupported(f"{name} {value:,} is more than {most:,}")
    layers, chunks = run.n_layers or 0, (run.pp or 1) * (run.vpp or 1)
    if chunks > layers > 0:
        raise Impossible(f"{layers:,} layers cannot fill {chunks:,} pipeline stages or chunks")


def offload_of(text: str) -> Offload:
    """What a row's words of ZeRO have in host memory: zero3+offload(opt,param).

    Raises Unsupported for words that are none of `OFFLOADED`.
    """
    if "offload" not in text:
        return NOTHING_OFFLOADED
    words = re.findall(r"\w+", text.partition("offload")[2])
    unknown = [word for word in words if word not in OFFLOADED]
    if unknown or not words:
        raise Unsupported(
            f"offloading {', '.join(unknown) or 'of what is not said'} is not modelled"
        )
    return Offload(**{OFFLOADED[word]: 1.0 for word in words})


def _zero(text: str, default: int | None) -> int:
    for word, level in ZERO_LEVELS:
        if word in text:
            return level
    if text or default is None:
        raise Unsupported(f"the ZeRO level of {text or '(blank)'!r} is not known")
    return default


def _level(text: str) -> MemoryLevel:
    if text not in CHECKPOINTS:
        raise Unsupported(f"activation checkpointing {text or '(blank)'!r} is not modelled")
    return CHECKPOINTS[text]


def _num_micro_batches(run: Run) -> int:
    assert run.dp and run.micro_batch
    if run.grad_accum:
        return run.grad_accum
    if not run.global_batch:
        raise Unsupported("neither grad_accum nor global_batch given")
    return max(run.global_batch // (run.dp * run.micro_batch), 1)
