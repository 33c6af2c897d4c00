"""Two steps of a small Llama by `mist apply`, and the exports of the same plans, for their targets.

python -m tests.validate_exports.two_steps FOLDER. FOLDER/model has the configuration and weights,
FOLDER/tokens.npy the samples. FOLDER/TARGET/N/ has a plan, its export and expected.json: the losses
that the target's own training must have, too, from the same weights and samples.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mist.export.targets import target_named
from mist.files import write_text
from mist.plans.file import save_plan
from mist.plans.workload import Attention, Precision
from mist.workflow.checking import HandLayout, check_layout
from mist.workflow.exporting import export_plan
from mist.workflow.request import Question
from tests.validate_exports.two_losses import LR, SAMPLES, SEQ_LEN, STEPS

ROOT = Path(__file__).parents[2]
RANKS = 4
# Those of torchtitan's llama3_debugmodel, on which the export of a model stands that it has not.
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 2048,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
LAYOUTS: dict[str, list[dict[str, Any]]] = {
    "accelerate": [
        {"zero": 3, "dp_replicate": 2, "micro_batch": 2, "checkpoint": "full"},
        {"zero": 2, "micro_batch": 1},
    ],
    "megatron": [
        {"zero": 1, "tp": 2, "micro_batch": 2, "checkpoint": "2"},
        {"pp": 2, "tp": 2, "micro_batch": 2, "layers": (4, 2), "checkpoint": "1"},
    ],
    "torchtitan": [
        {"zero": 3, "tp": 2, "micro_batch": 2, "checkpoint": "2"},
        {"pp": 2, "tp": 2, "micro_batch": 2, "layers": (4, 2), "checkpoint": "2,1"},
    ],
}


def main(folder: Path) -> None:
    """Write FOLDER, and train every plan of it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.1))
    model.save_pretrained(folder / "model")
    count = STEPS * SAMPLES * SEQ_LEN
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], count)
    np.save(folder / "tokens.npy", tokens)
    for name, layouts in LAYOUTS.items():
        for number, changes in enumerate(layouts):
            case = folder / name / str(number)
            case.mkdir(parents=True)
            _write(folder, case, name, changes)
            losses = _trained(folder, case)
            write_text(case / "expected.json", json.dumps(losses))
            print(f"{name} {changes}: mist apply has losses {losses}")


def _write(folder: Path, case: Path, name: str, changes: dict[str, Any]) -> None:
    """The plan of a layout, and its export beside it."""
    question = Question(
        model=str((folder / "model").resolve()),
        num_gpus=RANKS,
        seq_len=SEQ_LEN,
        global_batch=SAMPLES,
        precision=Precision.FP32,  # in bf16 losses are equal to three digits at best
        attention=Attention.MATH,
    )
    save_plan(check_layout(question, HandLayout(**changes)).plan, case / "plan.yaml")
    for file, text in export_plan(case / "plan.yaml", target_named(name)).files.items():
        (case / file).parent.mkdir(exist_ok=True)
        write_text(case / file, text)


def _trained(folder: Path, case: Path) -> list[float]:
    """The losses of `mist apply`."""
    log = case / "log.json"
    words = ["apply", case / "plan.yaml", "--steps", STEPS, "--lr", LR, "--log", log]
    words += ["--data", folder / "tokens.npy"]
    subprocess.run([sys.executable, ROOT / "cli.py", *map(str, words)], check=True)
    return [step["loss"] for step in json.loads(log.read_text())["steps"]]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
