"""From a run's columns to the layout that it trained with: what each pipeline stage holds."""

from dataclasses import dataclass
from typing import Final

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
    """Layers and recomputed layers of each stage, and what all stages share.

    `layers`, `num_full`: per stage, first first. `chunks`: of layers that a stage runs in turn
    (interleaved schedule; 1: 1F1B). `selective`: whether layers that are not recomputed whole are
    so in part, as the runtime does it.
    """

    dp: int
    tp: int
    zero: int
    micro_batch: int
    num_micro_batches: int
    chunks: int
    layers: tuple[int, ...]
    num_full: tuple[int, ...]
    selective: bool

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""
        return len(self.layers)

    def layers_at(self, level: MemoryLevel) -> tuple[int, ...]:
        """Layers of each stage at a memory level."""
        if level is MemoryLevel.FULL:
            return self.num_full
        kept = tuple(n - full for n, full in zip(self.layers, self.num_full, strict=True))
        return kept if (level is MemoryLevel.SELECTIVE) is self.selective else (0,) * len(kept)


def layout_of(run: Run, *, num_layers: int, zero: int | None, checkpoint: str) -> RunLayout:
    """The layout of a run; `zero` and `checkpoint` stand in where the run does not say.

    Raises Unsupported, naming what is missing or cannot be predicted.
    """
    _check(run)
    assert run.dp and run.tp and run.pp and run.micro_batch
    level = _zero(run.zero_or_fsdp, zero)
    layers = even_layers(num_layers, run.pp)
    memory_level = _level(run.activation_ckpt or checkpoint)
    return RunLayout(
        dp=run.dp,
        tp=run.tp,
        zero=level,
        micro_batch=run.micro_batch,
        num_micro_batches=_num_micro_batches(run),
        chunks=run.vpp or 1,
        layers=layers,
        num_full=layers if memory_level == "full" else (0,) * run.pp,
        selective=memory_level == "selective",
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


def _level(text: str) -> str:
    if text not in CHECKPOINTS:
        raise Unsupported(f"activation checkpointing {text or '(blank)'!r} is not modelled")
    return text


def _num_micro_batches(run: Run) -> int:
    assert run.dp and run.micro_batch
    if run.grad_accum is not None:
        return run.grad_accum
    if run.global_batch is None:
        raise Unsupported("neither grad_accum nor global_batch given")
    return max(run.global_batch // (run.dp * run.micro_batch), 1)
