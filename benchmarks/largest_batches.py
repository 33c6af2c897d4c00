"""AutoTempo's question: the largest batch of one card, and samples per second, by memory level.

Predicted, no card is needed; attention written out and dropout as the models have them, as Tempo's
authors trained (Andoorveedu et al. 2022, arXiv 2210.10246). The batch fills the card: no margin.

python benchmarks/largest_batches.py
"""

import tempfile
from pathlib import Path
from typing import Final

from paper_models import write_config

from mist.errors import MistError
from mist.plans.workload import Attention, Precision
from mist.trace import ConfigSource
from mist.workflow.checking import HandLayout, check_layout
from mist.workflow.request import Question

LEVELS: Final = ("none", "drop-activation", "drop-norm", "full")
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


def rate(question: Question, level: str, batch: int) -> float | None:
    """Samples per second of a batch in one piece, where it fits."""
    asked = Question(
        model=question.model,
        num_gpus=1,
        gpu=question.gpu,
        seq_len=question.seq_len,
        global_batch=batch,
        precision=question.precision,
        attention=Attention.MATH,
        margin_ratio=0.0,
        overrides=question.overrides,
    )
    checked = check_layout(asked, HandLayout(checkpoint=level, micro_batch=batch))
    return batch / checked.plan.estimate.step_s if checked.fits else None


def largest(question: Question, level: str) -> tuple[int, float]:
    """The largest batch that fits, and its samples per second; (0, 0.0) where none does."""
    low, high, best = 0, MOST + 1, 0.0
    while high - low > 1:
        middle = (low + high) // 2
        found = rate(question, level, middle)
        low, high, best = (low, middle, best) if found is None else (middle, high, found)
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
                    overrides=figures,
                )
                cells = []
                for level in LEVELS:
                    try:
                        batch, per_s = largest(question, level)
                        cells.append(f"{batch} ({per_s:.1f})")
                    except MistError as error:
                        cells.append(str(error))
                print(f"| {card} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
