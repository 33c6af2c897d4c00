"""Writes exports of each target into a folder, for the targets' own code to read.

python -m tests.validate_exports.write FOLDER. Plans are of Llama-3-8B: twelve or more written by
hand, every knob that the target has at least once, and legal plans drawn at random.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from mist.errors import InputError
from mist.export.rounding import expressible, refusals_of
from mist.export.target import ExportSource, Target
from mist.export.targets import TARGETS
from mist.files import write_text
from mist.plans.plan import Offload
from mist.plans.schedules import kind_of
from mist.trace.models.presets import PRESETS
from mist.workflow.checking import HandLayout, plan_by_hand
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

NUM_DRAWN = 40  # at random for each target; what it cannot say is left out
NUM_LAYERS, NUM_GPUS = 32, 16


def drawn(number: int, most_stages: int) -> Iterator[dict[str, Any]]:
    """Layouts at random, legal or not: the same ones for the same number."""
    random = Random(number)
    for _ in range(NUM_DRAWN):
        pp = random.choice([n for n in (1, 1, 2, 4) if n <= most_stages])
        vpp = random.choice([1, 2]) if pp > 1 else 1
        cuts = sorted(random.sample(range(1, NUM_LAYERS), pp * vpp - 1))
        layers = [b - a for a, b in zip([0, *cuts], [*cuts, NUM_LAYERS], strict=True)]
        ratio = random.choice([0.0, 0.0, 0.25, 1.0])
        yield {
            "pp": pp,
            "vpp": vpp,
            "tp": random.choice([1, 1, 2, 4]),
            "zero": random.randrange(4),
            "micro_batch": random.choice([1, 2]),
            "dp_replicate": random.choice([1, 1, 2]),
            "schedule": kind_of(vpp),
            "checkpoint": random.choice(["none", "full", "selective", "3"]),
            "offload": Offload(optimizer=ratio),
            "layers": tuple(layers),
        }


def main(folder: Path) -> None:
    """Write FOLDER/TARGET/N/ for every layout of every target."""
    for number, target in enumerate(TARGETS):
        if target.name not in LAYOUTS:
            continue
        rows = enumerate(LAYOUTS[target.name])
        by_hand = sum(_written(folder, target, n, changes) for n, changes in rows)
        most = 1 if target.expresses is not None and not target.expresses.schedules else 4
        rows = enumerate(drawn(number, most), start=100)
        at_random = sum(_written(folder, target, n, changes) for n, changes in rows)
        print(f"{target.name}: {by_hand} plans written by hand, {at_random} at random")
        assert by_hand >= 12
        assert at_random > 0


def _written(folder: Path, target: Target, number: int, changes: dict[str, Any]) -> bool:
    """Write one export; False for what is no legal plan, or none that the target can say."""
    question = Question(model=MODEL, num_gpus=NUM_GPUS, seq_len=4096, global_batch=128)
    try:
        _, plan = plan_by_hand(question, HandLayout(**changes))
    except InputError:
        return False
    if target.expresses is not None:
        plan, losses = expressible(plan, target.name, target.expresses)
        if refusals_of(losses):
            return False
    subject = ExportSource(plan=plan, path="plan.yaml", config=PRESETS[MODEL])
    for name, text in target.write(subject).files.items():
        path = folder / target.name / str(number) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return True


if __name__ == "__main__":
    main(Path(sys.argv[1]))
