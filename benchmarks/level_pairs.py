"""Predicted steps with and without the memory levels that convert layers, beside the search's time.

Processor seconds of the search alone, imports and trace excluded, each the least of some repeats.

python benchmarks/level_pairs.py [NAME ...] [--repeats 2] [--save FOLDER]
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

from paper_models import machine, write_config

from mist.plans.breakdown import layout_words
from mist.plans.file import save_plan
from mist.plans.plan import Plan
from mist.plans.search_space import SPACES, SearchSpace
from mist.plans.workload import Precision
from mist.trace import ConfigSource
from mist.trace.models.presets import QWEN3
from mist.workflow.planning import DEFAULT_EFFORT, search_plan
from mist.workflow.request import Question, compiled

# Qwen/Qwen3-32B.
QWEN3_32B: Final = ConfigSource(
    label="qwen3-32b",
    name="qwen3-32b",
    config={
        **QWEN3,
        "model_type": "qwen3",
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
)

PAIRS: Final = {
    "llama3-8b a100": Question(model="llama3-8b", num_gpus=8, gpu="a100-sxm-40"),
    "llama3-8b 4090": Question(model="llama3-8b", num_gpus=8, gpu="rtx-4090"),
    "gpt2-xl l4": Question(model="gpt2-xl", num_gpus=2, gpu="l4"),
    "llama3-70b a100": Question(model="llama3-70b", num_gpus=64, gpu="a100-sxm-80"),
    "bert-large v100": Question(
        model="bert-large", num_gpus=1, gpu="v100-sxm-32", precision=Precision.FP32
    ),
    "qwen3-32b h100": Question(model="qwen3-32b", num_gpus=16, gpu="h100-sxm"),
}


def searched(question: Question, space: SearchSpace, repeats: int) -> tuple[Plan, float]:
    """The plan of a space, and the processor seconds of its search."""
    programs = compiled(replace(question, levels=space.levels, heads=space.head))
    spent_s = []
    for _ in range(repeats):
        start = time.process_time()
        plan = search_plan(question, programs, space, DEFAULT_EFFORT).plan
        spent_s.append(time.process_time() - start)
    return plan, min(spent_s)


def main() -> None:
    """Print the table, and write the plans where a folder is named."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=list(PAIRS))
    parser.add_argument("--save", type=Path)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--spaces", nargs=2, default=["plain", "mist"])
    arguments = parser.parse_args()
    print(machine())
    print(f"{'job':<18} {'without':>9} {'with':>9} {'faster':>7} {'cpu_s':>6} {'cpu_s':>6} ratio")
    with tempfile.TemporaryDirectory() as folder:
        qwen = write_config(QWEN3_32B, Path(folder))
        for name in arguments.names:
            question = PAIRS[name]
            if question.model == QWEN3_32B.name:
                question = replace(question, model=qwen)
            (plain, plain_s), (levels, levels_s) = (
                searched(question, SPACES[space], arguments.repeats) for space in arguments.spaces
            )
            before_s, after_s = plain.estimate.step_s, levels.estimate.step_s
            print(f"{name:<18} {before_s:9.4g} {after_s:9.4g} {1 - after_s / before_s:7.2%} "
                  f"{plain_s:6.2f} {levels_s:6.2f} {levels_s / plain_s:5.2f}")  # fmt: skip
            for plan in (plain, levels):
                print(f"    {layout_words(plan.layout)}", flush=True)
            if arguments.save:
                save_plan(levels, arguments.save / f"{name.replace(' ', '-')}.yaml")


if __name__ == "__main__":
    main()
