"""The plans that the artifact of the Mist paper publishes, judged again by `mist check`.

Each is written as a plan file beside the configuration of its model, and `check_plan`, which the
command calls, reads it: the rules, the same estimate, the same limits. Beside it what the artifact
predicts and measured, and the best plan that a search of the same space finds.

    python benchmarks/published.py
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from paper_models import SIZES, gpt, machine, paper_question, prepared, write_config

from mist.plans.file import save_plan
from mist.plans.plan import Layout, Offload, StagePlan
from mist.plans.search_space import SPACES
from mist.plans.workload import Attention, MemoryLevel
from mist.search.tune import tune
from mist.symbolic.estimate import estimate
from mist.symbolic.load_programs import quiet
from mist.units import GIB
from mist.workflow.checking import Checked, check_plan
from mist.workflow.request import Question, unsearched_plan

FLASH, MATH = Attention.FLASH, Attention.MATH


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A plan of GPT; by stage its layers, those recomputed, and ZeRO level. Nothing is offloaded.

    `artifact_s`, `measured_s`: of a step, predicted by the artifact and measured; 0 where it prints
    none. `reserved_mib`: measured, of the fullest stage.
    """

    what: str = "tuned"
    gpu: str = "a100-sxm-40"
    size: str
    attention: Attention
    layers: tuple[int, ...]
    full: tuple[int, ...]
    zero: tuple[int, ...]
    dp: int
    tp: int
    micro_batch: int
    num_micro_batches: int
    artifact_s: float = 0.0
    measured_s: float = 0.0
    reserved_mib: float = 0.0


# Source: Dazz993/Mist d69e530, tuned_configs/l4-24gb/gpt/expected_summary.json, README.md (steps
# 2.4 and 2.5) and tuned_configs/a100-40gb/gpt. "Optimum of its own model": found by its own tuner
# with all samples, not published.
PUBLISHED: Final = (
    Published(
        gpu="l4", size="1.3b", attention=FLASH, layers=(13, 11), full=(0, 0), zero=(1, 1), dp=1,
        tp=1, micro_batch=2, num_micro_batches=16, artifact_s=6.698, measured_s=7.812,
        reserved_mib=20310,
    ),
    Published(
        what="optimum of its own model", gpu="l4", size="1.3b", attention=FLASH, layers=(24,),
        full=(1,), zero=(1,), dp=2, tp=1, micro_batch=2, num_micro_batches=8, artifact_s=6.677,
    ),
    Published(
        gpu="l4", size="1.3b", attention=MATH, layers=(13, 11), full=(0, 0), zero=(1, 1), dp=1,
        tp=1, micro_batch=1, num_micro_batches=32, artifact_s=9.606, measured_s=9.678,
        reserved_mib=20412,
    ),
    Published(
        what="README, tuned", gpu="l4", size="1.3b", attention=MATH, layers=(12, 12), full=(5, 0),
        zero=(1, 1), dp=1, tp=1, micro_batch=2, num_micro_batches=16, artifact_s=9.269,
        measured_s=9.935,
    ),
    Published(
        what="README, Megatron-LM's best", gpu="l4", size="1.3b", attention=MATH, layers=(24,),
        full=(24,), zero=(1,), dp=2, tp=1, micro_batch=8, num_micro_batches=2, artifact_s=10.659,
        measured_s=11.329, reserved_mib=21096,
    ),
    Published(
        size="1.3b", attention=FLASH, layers=(24,), full=(9,), zero=(1,), dp=2, tp=1,
        micro_batch=4, num_micro_batches=4,
    ),
    Published(
        size="1.3b", attention=MATH, layers=(24,), full=(0,), zero=(1,), dp=2, tp=1,
        micro_batch=1, num_micro_batches=16,
    ),
    Published(
        size="2.6b", attention=FLASH, layers=(32,), full=(4,), zero=(3,), dp=4, tp=1,
        micro_batch=2, num_micro_batches=8,
    ),
    Published(
        size="2.6b", attention=MATH, layers=(15, 17), full=(9, 5), zero=(1, 1), dp=2, tp=1,
        micro_batch=1, num_micro_batches=32,
    ),
    Published(
        size="6.7b", attention=FLASH, layers=(16, 16), full=(0, 0), zero=(3, 1), dp=4, tp=1,
        micro_batch=1, num_micro_batches=32,
    ),
    Published(
        size="6.7b", attention=MATH, layers=(15, 17), full=(7, 2), zero=(1, 1), dp=2, tp=2,
        micro_batch=1, num_micro_batches=64,
    ),
    Published(
        size="13b", attention=FLASH, layers=(19, 21), full=(7, 0), zero=(3, 3), dp=8, tp=1,
        micro_batch=1, num_micro_batches=32,
    ),
    Published(
        size="13b", attention=MATH, layers=(9, 10, 10, 11), full=(6, 6, 3, 0), zero=(1,) * 4,
        dp=2, tp=2, micro_batch=1, num_micro_batches=128,
    ),
    Published(
        size="22b", attention=FLASH, layers=(11, 12, 12, 13), full=(5, 4, 0, 0), zero=(1,) * 4,
        dp=4, tp=2, micro_batch=1, num_micro_batches=128,
    ),
    Published(
        size="22b", attention=MATH, layers=(6,) * 8, full=(6, 6, 6, 6, 6, 6, 4, 3),
        zero=(1, 1, 1, 1, 1, 1, 3, 2), dp=4, tp=1, micro_batch=1, num_micro_batches=128,
    ),
)  # fmt: skip


def stages_of(plan: Published) -> Iterator[StagePlan]:
    """The stages of a published plan."""
    num_ranks, first = plan.dp * plan.tp, 0
    for index, (count, full) in enumerate(zip(plan.layers, plan.full, strict=True)):
        memory = dict.fromkeys(MemoryLevel, 0)
        memory |= {MemoryLevel.NONE: count - full, MemoryLevel.FULL: full}
        yield StagePlan(
            layers=((first, count),), devices=(index * num_ranks, num_ranks), dp=plan.dp,
            tp=plan.tp, sp=False, cp=1, ep=1, micro_batch=plan.micro_batch,
            zero=plan.zero[index],  # type: ignore[arg-type]
            head="none", memory=memory, offload=Offload(),
        )  # fmt: skip
        first += count


def question_of(plan: Published) -> Question:
    """The setting of a published plan."""
    return paper_question(
        f"gpt-{plan.size}", plan.gpu, runtime="mist-fp16", attention=plan.attention
    )


def checked(plan: Published, folder: Path) -> Checked:
    """What `mist check` says of it, with the whole memory of the device for the plan."""
    asked = replace(question_of(plan), model=write_config(gpt(plan.size), folder))
    job, _ = prepared(question_of(plan))
    layout = Layout(stages=tuple(stages_of(plan)), num_micro_batches=plan.num_micro_batches)
    judged = estimate(job, layout)
    path = folder / "plan.yaml"
    save_plan(unsearched_plan(job, asked, layout, judged), path)
    return check_plan(path, margin_ratio=0.0)


def best_s(plan: Published, margin_ratio: float | None) -> float:
    """Seconds of the best plan that a search of the paper's space finds under a margin."""
    asked = replace(question_of(plan), margin_ratio=margin_ratio)
    job, limits = prepared(asked)
    found = tune(
        job, SPACES["paper"], limits=limits, num_alternatives=0, progress=quiet, method="dp"
    )
    return found.best.step_s


def words(plan: Published) -> str:
    """What a published plan does, in a few words."""

    def listed(values: tuple[int, ...]) -> str:
        return "+".join(map(str, values)) if len(set(values)) > 1 else str(values[0])

    pp = len(plan.layers)
    return (
        f"{plan.what}: pp{pp} dp{plan.dp} tp{plan.tp} zero{listed(plan.zero)} "
        f"mb{plan.micro_batch} x{plan.num_micro_batches}, {listed(plan.full)} of "
        f"{listed(plan.layers)} recomputed"
    )


def row(plan: Published, folder: Path) -> str:
    """A line of the table."""
    judged = checked(plan, folder)
    step_s = judged.plan.estimate.step_s
    published = [f"{value:.3f}" if value else "-" for value in (plan.artifact_s, plan.measured_s)]
    error = f"{step_s / plan.measured_s - 1:+.1%}" if plan.measured_s else "-"
    reserved = f"{plan.reserved_mib / 1024:.1f}" if plan.reserved_mib else "-"
    cells = [
        f"gpt-{plan.size}, {SIZES[plan.size][3]} x {plan.gpu}", plan.attention, words(plan),
        f"{step_s:.3f}", *published, error, f"{judged.peak_bytes / GIB:.1f}", reserved,
        f"{judged.limits.device_bytes / GIB:.1f}",
        "yes" if judged.fits else "no", f"{best_s(plan, 0.0):.3f}", f"{best_s(plan, None):.3f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


HEAD: Final = (
    "setting", "attention", "plan", "predicted s", "artifact predicts s", "measured s", "error",
    "peak predicted GiB", "reserved, measured GiB", "usable GiB", "fits", "best found s",
    "best found s, margin 12 %",
)  # fmt: skip


def main() -> None:
    """Print the table."""
    print(machine(), "\n")
    print(f"| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|")
    with tempfile.TemporaryDirectory() as folder:
        for plan in PUBLISHED:
            print(row(plan, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
