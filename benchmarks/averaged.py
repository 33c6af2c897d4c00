"""What it is worth to know that the first and the last micro-batch cost more than the others.

The Mist paper's inter-microbatch imbalance: gathers, reductions, transfers and the optimizer fall
on them. Here each group is also searched as if a step's micro-batches were alike, every stage with
the mean ((G - 1) t + u) / G of its stable time t and lone time u, and the plan that then looks best
is priced as it is, beside the best plan. Stages whose true step is over `REACH` times the best are
left out of both.

    python benchmarks/averaged.py
"""

from dataclasses import replace
from typing import Final

import numpy as np
from ablation import LADDER, Setting
from paper_models import SIZES, machine, paper_question, prepared

from mist.milp import InterStageProblem, solve
from mist.pareto.bounds import lower_bound_s
from mist.pareto.candidates import GroupModel
from mist.pareto.layouts import Picked, PricedLayout, layout_of, plain_layout
from mist.pareto.strategies import groups
from mist.plans.breakdown import layout_words
from mist.plans.plan import Limits
from mist.plans.workload import Attention
from mist.search.stage_frontiers import Bounds, CellStore, GroupProblem, problem_of
from mist.search.tune import tune
from mist.symbolic.job import Job
from mist.symbolic.load_programs import quiet

SPACE: Final = LADDER["+imbalance"]
REACH: Final = 1.35


def averaged(problem: InterStageProblem) -> tuple[InterStageProblem, list[int]]:
    """The problem with alike micro-batches: of each cell one point, and which it is."""
    g, cells, points = problem.num_micro_batches, [], []
    for cell in problem.cells:
        mean_s = ((g - 1) * cell.stable_s + cell.lone_s) / g
        best = int(mean_s.argmin())
        own_s = mean_s[best : best + 1]
        cells.append(replace(cell, stable_s=own_s, lone_s=own_s))
        points.append(best)
    return replace(problem, cells=tuple(cells)), points


def picked(found: GroupProblem, best_s: float) -> tuple[float, PricedLayout] | None:
    """The layout of a group that looks faster than `best_s`, and how fast it looks."""
    problem, points = averaged(found.problem)
    solution = solve(problem, upper_bound_s=best_s, method="dp")
    if solution is None or solution.step_s >= best_s:
        return None
    stages = [
        Picked(
            count=problem.cells[choice.cell].count,
            strategies=found.points[choice.cell][1],
            points=found.points[choice.cell][0],
            point=points[choice.cell],
        )
        for choice in solution.choices
    ]
    return solution.step_s, layout_of(found.model.job, found.model.group, stages)


def unaware(job: Job, limits: Limits, longest_s: float) -> PricedLayout:
    """The layout that looks best where micro-batches are taken to be alike."""
    looks_s, best, store = np.inf, None, CellStore()
    for group in groups(job, SPACE):
        if lower_bound_s(job, group, SPACE.levels) > longest_s:
            continue
        model = GroupModel(job, group, group.strategies, SPACE)
        found = problem_of(model, Bounds(limits=limits, step_s=longest_s), store)
        if (better := picked(found, looks_s)) is not None:
            looks_s, best = better
    assert best is not None
    return best


def row(setting: Setting) -> str:
    """A line of the table."""
    asked = paper_question(
        setting.model, setting.gpu, runtime=setting.runtime, attention=setting.attention
    )
    job, limits = prepared(asked)
    aware = tune(job, SPACE, limits=limits, num_alternatives=0, progress=quiet, method="dp").best
    naive = unaware(job, limits, REACH * aware.step_s)
    words = [layout_words(plain_layout(job, layout)) for layout in (aware, naive)]
    return (
        f"| {setting.words} | {aware.step_s:.4g} | {naive.step_s:.4g} "
        f"| {naive.step_s / aware.step_s:.3f} | {' | '.join(words)} |"
    )


def main() -> None:
    """Print the table, for GPT up to 13B."""
    print(machine(), "\n")
    print("| model | GPUs | attention | aware s | unaware s | gain | aware | unaware |")
    print("|---" * 8 + "|")
    for gpu in ("l4", "a100-sxm-40"):
        for size in list(SIZES)[:4]:
            for attention in Attention:
                model = f"gpt-{size}"
                setting = Setting(model=model, gpu=gpu, runtime="mist-fp16", attention=attention)
                print(row(setting), flush=True)


if __name__ == "__main__":
    main()
