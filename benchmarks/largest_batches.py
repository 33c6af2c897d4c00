"""AutoTempo's question: the largest batch of one card, and samples per second, by memory level.

Predicted, no card is needed; attention written out and dropout as the models have them, as Tempo's
authors trained (Andoorveedu et al. 2022, arXiv 2210.10246). The batch fills the card: no margin.

python benchmarks/largest_batches.py
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Final

from paper_models import write_config

from mist.plans.memory_levels import memory_of
from mist.plans.plan import DEFAULT_SCHEDULE, NOTHING_OFFLOADED
from mist.plans.uniform_stages import uniform_layout
from mist.plans.workload import Attention, MemoryLevel, Precision
from mist.symbolic.estimate import estimate
from mist.symbolic.program import ModelPrograms
from mist.trace import ConfigSource
from mist.workflow.request import Question, compiled, job_of, limits_of

LEVELS: Final = tuple(
    MemoryLevel(word) for word in ("none", "drop-activation", "drop-norm", "full")
)
# GPT-2 of 345 M parameters: openai-community/gpt2-medium.
GPT2: Final = ConfigSource(
    label="gpt2-medium",
    name="gpt2-medium",
    config={"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16, "n_positions": 1024},
)
# NVIDIA, RTX 2080 Ti: 13.45 TFLOP/s in fp32, 616 GB/s; torch reports 10.76 GiB of its 11.
TURING: Final = {
    "device.memory_bytes": 11.55e9,
    "device.hbm_bytes_per_s": 6.16e11,
    "device.gemm.fp32.peak_flop_per_s": 1.345e13,
}
CARDS: Final = {
    "2080 Ti-like, fp32": ("v100-sxm-32", Precision.FP32, TURING),
    "V100 32 GB, fp32": ("v100-sxm-32", Precision.FP32, {}),
    "A100 40 GB, bf16": ("a100-sxm-40", Precision.BF16, {}),
}
MOST: Final = 512


def rate(question: Question, programs: ModelPrograms, level: MemoryLevel) -> float | None:
    """Samples per second of the global batch in one piece, where it fits; its margin is 0."""
    job = job_of(question, programs)
    layout = uniform_layout(
        {"dp": 1, "tp": 1, "zero": 0, "dp_replicate": 1, "micro_batch": question.global_batch},
        chunk_layers=(job.num_layers,),
        memory=[memory_of(job.num_layers, level)],
        num_micro_batches=1,
        schedule=DEFAULT_SCHEDULE,
        offload=NOTHING_OFFLOADED,
        shards_sequence=False,
    )
    judged = estimate(job, layout)
    fits = judged.stages[0].peak_bytes <= limits_of(job, question).device_bytes
    return question.global_batch / judged.step_s if fits else None


def largest(question: Question, programs: ModelPrograms, level: MemoryLevel) -> tuple[int, float]:
    """The largest batch that fits, and its samples per second; (0, 0.0) where none does."""
    low, high, best = 0, MOST + 1, 0.0
    while high - low > 1:
        middle = (low + high) // 2
        found = rate(replace(question, global_batch=middle), programs, level)
        if found is None:
            high = middle
        else:
            low, best = middle, found
    return low, best


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        models = {"BERT-Large": ("bert-large", 512)}
        models["GPT-2 345M"] = (write_config(GPT2, Path(folder)), 1024)
        for card, (gpu, precision, figures) in CARDS.items():
            for name, (model, seq_len) in models.items():
                question = Question(
                    model=model,
                    num_gpus=1,
                    gpu=gpu,
                    seq_len=seq_len,
                    precision=precision,
                    attention=Attention.MATH,
                    margin_ratio=0.0,
                    overrides=figures,
                    levels=LEVELS,
                )
                programs = compiled(question)
                found = (largest(question, programs, level) for level in LEVELS)
                cells = [f"{batch} ({per_s:.1f})" for batch, per_s in found]
                print(f"| {card} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
