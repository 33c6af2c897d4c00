"""From a run's columns to the layout that it trained with: what each pipeline stage holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from mist.plans.memory_levels import memory_of
from mist.plans.plan import even_layers
from mist.plans.search_space import CHECKPOINTS
from mist.plans.workload import MemoryLevel
from mist.validate.measured_runs import Run
from mist.validate.run_models import Unsupported

ZERO_LEVELS: Final = (
    ("zero1", 1),
    ("zero2", 2),
    ("zero3", 3),
    ("fsdp", 3),
    ("hsdp", 3),
    ("none", 0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLayout:
    """Layers of each stage by memory level, first stage first, and what all stages share.

    `chunks`: of layers that a stage runs in turn (interleaved schedule; 1: 1F1B).
    """

    dp: int
    tp: int
    zero: int
    micro_batch: int
    num_micro_batches: int
    chunks: int
    memory: tuple[Mapping[MemoryLevel, int], ...]

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""
        return len(self.memory)


def layout_of(run: Run, *, num_layers: int, zero: int | None, checkpoint: str) -> RunLayout:
    """The layout of a run; `zero` and `checkpoint` stand in where the run does not say.

    Raises Unsupported, naming what is missing or cannot be predicted.
    """
    _check(run)
    assert run.dp and run.tp and run.pp and run.micro_batch
    level = _zero(run.zero_or_fsdp, zero)
    memory_level = _level(run.activation_ckpt or checkpoint)
    layers = even_layers(num_layers, run.pp)
    return RunLayout(
        dp=run.dp,
        tp=run.tp,
        zero=level,
        micro_batch=run.micro_batch,
        num_micro_batches=_num_micro_batches(run),
        chunks=run.vpp or 1,
        memory=tuple(memory_of(count, memory_level) for count in layers),
    )


def _check(run: Run) -> None:
    names = ("dp", "tp", "pp", "micro_batch")
    if absent := [name for name in names if not getattr(run, name)]:
        raise Unsupported(f"{', '.join(absent)} not given")
    for name, words in (("cp", "context"), ("ep", "expert")):
        if (getattr(run, name) or 1) > 1:
            raise Unsupported(f"{words} parallelism is not modelled")


def _zero(text: str, default: int | None) -> int:
    if "offload" in text:
        raise Unsupported("offloading is not modelled")
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
    if run.grad_accum is not None:
        return run.grad_accum
    if run.global_batch is None:
        raise Unsupported("neither grad_accum nor global_batch given")
    return max(run.global_batch // (run.dp * run.micro_batch), 1)
