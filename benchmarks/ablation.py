"""What each part of the search space is worth by prediction, beside what the Mist paper measured.

A ladder of spaces from 3D parallelism up, each holding the one before, and the spaces of Megatron
and DeepSpeed: the predicted step time of the best plan of each, on the models and GPUs of the paper
(EuroSys'25), under its own executor and under PyTorch. All spaces are priced for the same executor:
what differs is the plan alone.

    python benchmarks/ablation.py [--only gpt-1.3b] [--margin 0]
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from paper_models import FAMILIES, SIZES, machine, paper_question, prepared

from mist.errors import Infeasible
from mist.pareto.layouts import stage_plans
from mist.pareto.strategies import expressible
from mist.plans.breakdown import layout_words
from mist.plans.memory_levels import USUAL
from mist.plans.plan import Layout, Limits
from mist.plans.search_space import PAPER_RATIOS, SPACES, SearchSpace
from mist.plans.workload import Attention, MemoryLevel
from mist.search.tune import tune
from mist.symbolic.job import Job
from mist.symbolic.load_programs import quiet

START: Final = SPACES["3d"]
CHECKPOINTS: Final = replace(START, levels=USUAL, some_layers=True)
ZERO: Final = replace(CHECKPOINTS, zero=(0, 1, 2, 3))
OFFLOAD: Final = replace(ZERO, offload=PAPER_RATIOS)
LADDER: Final = {
    "3d": START,
    "+checkpoint": CHECKPOINTS,
    "+zero": ZERO,
    "+offload": OFFLOAD,
    "+imbalance": replace(OFFLOAD, unlike_stages=True),
    "+schedules": SPACES["plain"],
}
"""Stages alike in all but their position until "+imbalance"; 1F1B alone until "+schedules"."""

BASELINES: Final = {name: SPACES[name] for name in ("megatron", "deepspeed")}
UNLIKE: Final = replace(START, unlike_stages=True)
CONTROLS: Final = {
    "all recomputed": replace(START, levels=(MemoryLevel.FULL,)),
    "3d, unlike": UNLIKE,
    "3d, unlike, +checkpoint": replace(CHECKPOINTS, unlike_stages=True),
}
"""What the gain of a rung hangs on: where the ladder starts, and the order of its rungs."""

GAINS: Final = {  # what: the space, the space that it is compared with, what the paper measured
    "checkpointing of some layers": ("+checkpoint", "3d", "1.12"),
    "the same, over recomputing all": ("+checkpoint", "all recomputed", "1.12"),
    "the same, where stages may differ": ("3d, unlike, +checkpoint", "3d, unlike", "1.12"),
    "ZeRO-2 and 3": ("+zero", "+checkpoint", "-"),
    "offloading": ("+offload", "+zero", "1.07"),
    "unlike stages": ("+imbalance", "+offload", "1.09"),
    "the same, over 3D": ("3d, unlike", "3d", "1.09"),
    "schedules": ("+schedules", "+imbalance", "-"),
    "all over 3D": ("+schedules", "3d", "1.28, over Megatron-LM"),
    "all over the Megatron space": ("+schedules", "megatron", "1.28, over Megatron-LM"),
    "all over the DeepSpeed space": ("+schedules", "deepspeed", "-"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where a ladder is climbed."""

    model: str
    gpu: str
    runtime: str
    attention: Attention

    @property
    def words(self) -> str:
        """Its first cells in a table."""
        num_gpus = SIZES[self.model.split("-")[1]][3]
        return f"{self.model} | {num_gpus} x {self.gpu} | {self.attention}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The best plan of a space: predicted seconds of a step, and what it does."""

    step_s: float
    words: str


NOTHING: Final = Found(step_s=np.inf, words="nothing fits")
Climbed = Mapping[str, Found]


def settings() -> Iterator[Setting]:
    """Every model of the paper: both attentions under its executor, flash under PyTorch."""
    for gpu in ("l4", "a100-sxm-40"):
        for size in SIZES:
            for model in (f"{family}-{size}" for family in FAMILIES):
                for attention in Attention:
                    yield Setting(model=model, gpu=gpu, runtime="mist-fp16", attention=attention)
                yield Setting(model=model, gpu=gpu, runtime="torch", attention=Attention.FLASH)


def climbed(setting: Setting, margin_ratio: float | None) -> Climbed:
    """The best plan of each space; spaces that the runtime cannot tell apart are searched once.

    `margin_ratio`: share of the device memory that stays free; None for the runtime's own.
    """
    start = time.process_time()
    asked = paper_question(
        setting.model, setting.gpu, runtime=setting.runtime, attention=setting.attention
    )
    job, limits = prepared(replace(asked, margin_ratio=margin_ratio))
    known: list[tuple[SearchSpace, Found]] = []
    found = {}
    for name, space in (LADDER | BASELINES | CONTROLS).items():
        own = replace(expressible(space, job.platform.runtime), name="")
        same = [best for other, best in known if other == own]
        found[name] = same[0] if same else best_of(job, limits, space)
        known.append((own, found[name]))
    spent_s = time.process_time() - start
    print(f"{setting.words} | {setting.runtime}: {spent_s:.1f} s", file=sys.stderr, flush=True)
    return found


def best_of(job: Job, limits: Limits, space: SearchSpace) -> Found:
    """The best plan of a space."""
    try:
        found = tune(job, space, limits=limits, num_alternatives=0, progress=quiet, method="dp")
    except Infeasible:
        return NOTHING
    best = found.best
    words = layout_words(
        Layout(
            stages=stage_plans(job, best),
            num_micro_batches=best.num_micro_batches,
            schedule=best.schedule,
        )
    )
    return Found(step_s=best.step_s, words=words)


def seconds_table(rows: Sequence[tuple[Setting, Climbed]]) -> Iterator[str]:
    """A line for each setting: predicted seconds of the best plan of each space."""
    names = list(LADDER | BASELINES)
    yield f"| model | GPUs | attention | {' | '.join(names)} |"
    yield "|---" * (3 + len(names)) + "|"
    for setting, found in rows:
        steps = [found[name].step_s for name in names]
        cells = " | ".join(f"{step:.4g}" if step < np.inf else "-" for step in steps)
        yield f"| {setting.words} | {cells} |"


def plans_table(rows: Sequence[tuple[Setting, Climbed]]) -> Iterator[str]:
    """The best plans of GPT in three spaces, in words."""
    names = ("3d", "+offload", "+schedules")
    yield f"| model | GPUs | attention | {' | '.join(names)} |"
    yield "|---" * (3 + len(names)) + "|"
    for setting, found in rows:
        if setting.model.startswith("gpt"):
            yield f"| {setting.words} | {' | '.join(found[name].words for name in names)} |"


def summary(rows: Sequence[tuple[Setting, Climbed]]) -> Iterator[str]:
    """Gains over settings in which both spaces have a plan: geometric mean, largest, how many."""
    parts = {
        f"{gpu}, {runtime}": [f for s, f in rows if (s.gpu, s.runtime) == (gpu, runtime)]
        for runtime in ("mist-fp16", "torch")
        for gpu in ("l4", "a100-sxm-40")
    }
    yield f"| predicted gain | {' | '.join(parts)} | the paper, measured |"
    yield "|---" * (2 + len(parts)) + "|"
    for what, (space, base, paper) in GAINS.items():
        words = " | ".join(gain_words(part, space, base) for part in parts.values())
        yield f"| {what} | {words} | {paper} |"


def gain_words(part: Sequence[Climbed], space: str, base: str) -> str:
    """How many times faster one space is than another: "1.046; 1.13 (of 10)"."""
    ratios = [found[base].step_s / found[space].step_s for found in part if base_fits(found, base)]
    if not ratios:
        return "-"
    return f"{np.exp(np.log(ratios).mean()):.3f}; {max(ratios):.2f} (of {len(ratios)})"


def base_fits(found: Climbed, base: str) -> bool:
    """Whether the smaller space has a plan; then the larger one does."""
    return found[base].step_s < np.inf


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--margin", type=float, help="share of the device memory that stays free")
    asked = parser.parse_args()
    print(machine(), "\n", flush=True)
    rows = [(each, climbed(each, asked.margin)) for each in settings() if asked.only in each.model]
    print("\n".join(summary(rows)), "\n")
    for runtime in ("mist-fp16", "torch"):
        own = [row for row in rows if row[0].runtime == runtime]
        print(f"Runtime {runtime}, predicted seconds of a step (-: nothing fits):\n")
        print("\n".join([*seconds_table(own), "", *plans_table(own), ""]))


if __name__ == "__main__":
    main()
