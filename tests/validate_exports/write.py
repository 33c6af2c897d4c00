"""Writes twelve exports of each target into a folder, for the targets' own code to read.

python -m tests.validate_exports.write FOLDER. Plans are of Llama-3-8B, written by hand: every knob
that the target has at least once.
"""

import sys
from pathlib import Path
from typing import Any

from mist.export.rounding import expressible, refusals_of
from mist.export.target import ExportSource
from mist.export.targets import TARGETS
from mist.files import write_text
from mist.plans.plan import Offload
from mist.plans.schedules import kind_of
from mist.trace.models.presets import PRESETS
from mist.workflow.checking import HandLayout, check_layout
from mist.workflow.request import Question

MODEL = "llama3-8b"
WHOLE = Offload(weights=1.0, grads=1.0, optimizer=1.0)
LONE: list[dict[str, Any]] = [
    *({"zero": zero} for zero in range(4)),
    {"zero": 3, "checkpoint": "full"},
    {"zero": 2, "micro_batch": 4},
    {"zero": 1, "checkpoint": "full", "micro_batch": 2},
    {"tp": 2, "zero": 2},
    {"tp": 8, "zero": 1},
]
SHARED: list[dict[str, Any]] = [
    *LONE,
    {"zero": 2, "dp_replicate": 2},
    {"zero": 3, "dp_replicate": 2, "checkpoint": "full"},
    {"zero": 3, "offload": WHOLE},
    {"tp": 4, "zero": 2, "dp_replicate": 2},
]
PIPED: list[dict[str, Any]] = [
    *LONE,
    {"pp": 2, "zero": 1},
    {"pp": 4, "tp": 2, "layers": (9, 8, 8, 7)},
    {"pp": 2, "tp": 2, "vpp": 2, "schedule": kind_of(2), "checkpoint": "2"},
    {"pp": 2, "vpp": 2, "schedule": kind_of(2), "layers": (9, 8, 8, 7)},
    {"tp": 2, "zero": 1, "checkpoint": "selective"},
]
STREAMED: list[dict[str, Any]] = [
    *LONE,
    {"zero": 3, "offload": Offload(optimizer=0.5)},
    {"zero": 2, "offload": Offload(optimizer=1.0)},
    {"zero": 1, "offload": Offload(optimizer=1.0)},
]
ALONE: list[dict[str, Any]] = [
    *({"zero": zero, "micro_batch": each} for zero in range(4) for each in (1, 2)),
    {"zero": 3, "checkpoint": "full"},
    *(each for each in STREAMED if each.get("offload")),
]
LAYOUTS = {
    "megatron": PIPED,
    "torchtitan": PIPED,
    "deepspeed": STREAMED,
    "accelerate": SHARED,
    "megatron-bridge": PIPED,
    "llamafactory": ALONE,
    "axolotl": SHARED,
    "kubernetes": SHARED,
    "skypilot": SHARED,
}


def main(folder: Path) -> None:
    """Write FOLDER/TARGET/N/ for every layout of every target."""
    question = Question(model=MODEL, num_gpus=16, seq_len=4096, global_batch=128)
    for target in TARGETS:
        written = 0
        for number, changes in enumerate(LAYOUTS.get(target.name, [])):
            plan = check_layout(question, HandLayout(**changes)).plan
            fitting = plan
            if target.expresses is not None:
                fitting, losses = expressible(plan, target.name, target.expresses)
                if refusals := refusals_of(losses):
                    print(f"{target.name} {changes}: {'; '.join(map(str, refusals))}")
                    continue
            subject = ExportSource(plan=fitting, path="plan.yaml", config=PRESETS[MODEL])
            for name, text in target.write(subject).files.items():
                path = folder / target.name / str(number) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, text)
            written += 1
        assert not LAYOUTS.get(target.name) or written >= 12, f"{target.name}: {written}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
