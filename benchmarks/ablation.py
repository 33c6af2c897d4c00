"""What each part of the search space is worth by prediction, beside what the Mist paper measured.

A ladder of spaces from 3D parallelism up, each holding the one before, and the spaces of Megatron
and DeepSpeed: the predicted step time of the best plan of each, on the models and GPUs of the paper
(EuroSys'25), under its own executor and under PyTorch. Then plans that its artifact publishes with
measured steps, judged again.

    python benchmarks/ablation.py
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from paper_models import SIZES, machine, paper_question, prepared

from mist.errors import Infeasible
from mist.estimate import Job, estimate
from mist.plans import Limits, Offload, StagePlan
from mist.programs import quiet
from mist.spaces import PAPER_RATIOS, SPACES, SearchSpace
from mist.spec import Attention, MemoryLevel
from mist.tune import tune

FULL_OR_NONE: Final = (MemoryLevel.EAGER, MemoryLevel.FULL)
START: Final = SPACES["3d"]
CHECKPOINTS: Final = replace(START, levels=tuple(MemoryLevel), some_layers=True)
ZERO: Final = replace(CHECKPOINTS, zero=(0, 1, 2, 3))
OFFLOAD: Final = replace(ZERO, offload=PAPER_RATIOS)
LADDER: Final = {
    "3d": START,
    "+checkpoint": CHECKPOINTS,
    "+zero": ZERO,
    "+offload": OFFLOAD,
    "+imbalance": replace(OFFLOAD, unlike_stages=True),
    "mist": SPACES["mist"],
}
"""Stages alike in all but their position until "+imbalance"; one kind of schedule until "mist"."""

# Megatron-LM recomputes all layers, or a number of them, never selectively in the paper's version.
OTHERS: Final = {
    "megatron": replace(SPACES["megatron"], levels=FULL_OR_NONE, schedules=START.schedules),
    "deepspeed": SPACES["deepspeed"],
}
PAPER: Final = {"+checkpoint": 1.12, "+offload": 1.07, "+imbalance": 1.09, "mist": 1.28}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where a ladder is climbed."""

    model: str
    gpu: str
    runtime: str
    attention: Attention


def settings() -> Iterator[Setting]:
    """GPT under the paper's executor with both attentions; under PyTorch, and Llama, with flash."""
    for gpu in ("l4", "a100-sxm-40"):
        for size in SIZES:
            for attention in Attention:
                yield Setting(
                    model=f"gpt-{size}", gpu=gpu, runtime="mist-fp16", attention=attention
                )
            for model, runtime in ((f"gpt-{size}", "torch"), (f"llama-{size}", "mist-fp16")):
                yield Setting(model=model, gpu=gpu, runtime=runtime, attention=Attention.FLASH)


def climbed(setting: Setting) -> dict[str, float]:
    """Predicted seconds of a step by space; infinite where nothing fits."""
    asked = paper_question(
        setting.model, setting.gpu, runtime=setting.runtime, attention=setting.attention
    )
    job, limits = prepared(asked)
    return {name: best_s(job, limits, space) for name, space in (LADDER | OTHERS).items()}


def best_s(job: Job, limits: Limits, space: SearchSpace) -> float:
    """Seconds of a step of the best plan of a space."""
    try:
        found = tune(job, space, limits=limits, num_alternatives=0, progress=quiet, method="dp")
    except Infeasible:
        return np.inf
    return found.best.step_s


def gains(steps: dict[str, float]) -> dict[str, float]:
    """What each rung gains over the one before; "mist": over the best of Megatron's space."""
    names = list(LADDER)
    over = dict(zip(names[1:], names, strict=False)) | {"mist": "megatron"}
    return {name: steps[below] / steps[name] for name, below in over.items()}


def row(setting: Setting, steps: dict[str, float]) -> str:
    """A line of the table: seconds, then the whole space over 3D and over Megatron's."""
    seconds = " | ".join(f"{step:.4g}" if step < np.inf else "-" for step in steps.values())
    over = [steps[name] / steps["mist"] for name in ("3d", "megatron", "deepspeed")]
    ratios = " | ".join(f"{ratio:.2f}" if ratio < np.inf else "-" for ratio in over)
    gpus = f"{SIZES[setting.model.split('-')[1]][3]} x {setting.gpu}"
    return f"| {setting.model} | {gpus} | {setting.attention} | {seconds} | {ratios} |"


def ladder_tables() -> str:
    """One table for each runtime, and the mean gain of each rung beside the paper's."""
    found = [(setting, climbed(setting)) for setting in settings()]
    heads = [*LADDER, *OTHERS, "mist over 3d", "over megatron", "over deepspeed"]
    lines = []
    for runtime in ("mist-fp16", "torch"):
        lines += [f"Runtime `{runtime}`, predicted seconds of a step (-: nothing fits):", ""]
        lines += [f"| model | GPUs | attention | {' | '.join(heads)} |", "|---" * 14 + "|"]
        lines += [row(*each) for each in found if each[0].runtime == runtime] + [""]
    return "\n".join([*lines, *summary(found)])


def summary(found: list[tuple[Setting, dict[str, float]]]) -> Iterator[str]:
    """Geometric means of the gains over settings in which both spaces have a plan."""
    yield "| gain (geometric mean; largest) | L4 | A100 | PyTorch | the paper, measured |"
    yield "|---|---|---|---|---|"
    parts = (
        [s for t, s in found if t.gpu == "l4" and t.runtime == "mist-fp16"],
        [s for t, s in found if t.gpu == "a100-sxm-40" and t.runtime == "mist-fp16"],
        [s for t, s in found if t.runtime == "torch"],
    )
    for name in gains(found[0][1]):
        words = " | ".join(_gain_words([gains(steps)[name] for steps in part]) for part in parts)
        label = "mist over megatron" if name == "mist" else name
        yield f"| {label} | {words} | {PAPER.get(name, '-')} |"


def _gain_words(ratios: list[float]) -> str:
    known = np.array([ratio for ratio in ratios if np.isfinite(ratio)])
    return f"{np.exp(np.log(known).mean()):.3f}; {known.max():.2f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A plan of GPT-1.3B on 2 L4, with what the artifact predicts and measured (s, GB; 0: not).

    `layers` and `full` by stage: all, and recomputed. Source: Dazz993/Mist d69e530,
    tuned_configs/l4-24gb/gpt/expected_summary.json and README.md, steps 2.4 and 2.5.
    """

    what: str
    attention: Attention
    layers: tuple[int, ...]
    full: tuple[int, ...]
    micro_batch: int
    num_micro_batches: int
    artifact_s: float
    measured_s: float


PUBLISHED: Final = (
    Published(
        what="tuned", attention=Attention.FLASH, layers=(13, 11), full=(0, 0),
        micro_batch=2, num_micro_batches=16, artifact_s=6.698, measured_s=7.812,
    ),
    Published(
        what="optimum of its own model", attention=Attention.FLASH, layers=(24,), full=(1,),
        micro_batch=2, num_micro_batches=8, artifact_s=6.677, measured_s=0.0,
    ),
    Published(
        what="tuned", attention=Attention.MATH, layers=(13, 11), full=(0, 0),
        micro_batch=1, num_micro_batches=32, artifact_s=9.606, measured_s=9.678,
    ),
    Published(
        what="README, tuned", attention=Attention.MATH, layers=(12, 12), full=(5, 0),
        micro_batch=2, num_micro_batches=16, artifact_s=9.269, measured_s=9.935,
    ),
    Published(
        what="README, Megatron-LM's best", attention=Attention.MATH, layers=(24,), full=(24,),
        micro_batch=8, num_micro_batches=2, artifact_s=10.659, measured_s=11.329,
    ),
)  # fmt: skip


def stages_of(plan: Published) -> list[StagePlan]:
    """The stages of a published plan: ZeRO-1, nothing offloaded."""
    ranks, first, stages = 2 // len(plan.layers), 0, []
    for index, (count, full) in enumerate(zip(plan.layers, plan.full, strict=True)):
        memory = dict.fromkeys(MemoryLevel, 0)
        memory |= {MemoryLevel.EAGER: count - full, MemoryLevel.FULL: full}
        stages.append(
            StagePlan(
                layers=((first, count),), devices=(index * ranks, ranks), dp=ranks, tp=1,
                sp=False, cp=1, ep=1, micro_batch=plan.micro_batch, zero=1, head="eager",
                memory=memory, offload=Offload(),
            )
        )  # fmt: skip
        first += count
    return stages


def published_table() -> str:
    """Predicted beside measured, and the best plan that the search finds for the same question."""
    lines = [
        "| plan of GPT-1.3B on 2 x L4 | attention | predicted | artifact predicts | measured "
        "| error | best plan found, predicted |",
        "|---|---|---|---|---|---|---|",
    ]
    for plan in PUBLISHED:
        asked = paper_question("gpt-1.3b", "l4", runtime="mist-fp16", attention=plan.attention)
        job, limits = prepared(asked)
        step_s = estimate(job, stages_of(plan), plan.num_micro_batches).step_s
        best = best_s(job, limits, SPACES["mist"])
        known = plan.measured_s > 0
        lines.append(
            f"| {plan.what}: layers {list(plan.layers)}, {list(plan.full)} recomputed, "
            f"b={plan.micro_batch}, G={plan.num_micro_batches} | {plan.attention} "
            f"| {step_s:.3f} s | {plan.artifact_s:.3f} s "
            f"| {f'{plan.measured_s:.3f} s' if known else 'not'} "
            f"| {f'{step_s / plan.measured_s - 1:+.1%}' if known else '-'} | {best:.3f} s |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    print(machine(), "\n")
    print(published_table(), "\n", flush=True)
    print(ladder_tables())


if __name__ == "__main__":
    main()
