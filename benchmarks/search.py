"""Processor seconds of whole searches, imports and trace excluded, beside the bars that they keep.

Then those of one job as the space grows, along the ladder of ablation.py.

python benchmarks/search.py
"""

import resource
import time
from dataclasses import replace
from typing import Final

from ablation import LADDER
from paper_models import machine, paper_question, prepared

from mist.plans.search_space import SPACES, SearchSpace
from mist.search.tune import tune
from mist.workflow.request import Question

JOBS: Final = {
    "GPT-1.3B, 2 L4": replace(paper_question("gpt-1.3b", "l4"), global_batch=32),
    "GPT-22B, 32 L4": paper_question("gpt-22b", "l4"),
    "Llama-70B, 512 H100": Question(
        model="llama3-70b", num_gpus=512, seq_len=4096, global_batch=1024
    ),
    "Llama-405B, 16384 H100": Question(
        model="llama3-405b", num_gpus=16384, seq_len=8192, global_batch=2048
    ),
}
BARS_S: Final = {"paper": (1, 5, 8, 10), "plain": (None,) * 4, "whole": (None, 15, 30, 60)}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def row(name: str, label: str, space: SearchSpace, bar_s: int | None = None) -> str:
    """One line of the table: a job in a space, by its label."""
    job, limits = prepared(JOBS[name])
    before_mib, start = peak_mib(), time.process_time()
    found = tune(job, space, limits=limits, num_alternatives=5, progress=lambda _: None)
    spent_s, counts = time.process_time() - start, found.statistics
    bar = "-" if bar_s is None else str(bar_s)
    return (
        f"{name:<24} {label:<11} {spent_s:7.2f} {bar:>4} {peak_mib() - before_mib:6.0f} "
        f"{counts['groups']:6} {counts['groups_solved']:6} {counts['stages_evaluated']:11} "
        f"{counts['points']:7} {found.best.step_s:9.4g}"
    )


def main() -> None:
    """Print the table."""
    print(machine())
    print(f"{'job':<24} {'space':<11} {'cpu_s':>7} bar_s {'MiB':>5} groups solved {'stages':>11} "
          f"{'points':>7} {'step_s':>9}")  # fmt: skip
    for label, bars in BARS_S.items():
        for name, bar_s in zip(JOBS, bars, strict=True):
            print(row(name, label, SPACES[label], bar_s), flush=True)
    for label, space in LADDER.items():
        print(row("GPT-22B, 32 L4", label, space), flush=True)


if __name__ == "__main__":
    main()
