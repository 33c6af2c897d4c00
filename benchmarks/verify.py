"""The cost model against the real program: plans drawn by a seed, dry-run on their end stages.

    python benchmarks/verify.py [--plans 40] [--seed 1] [--skip 0]

Prints a table (markdown) of predicted and seen live peaks of each stage, whether all collectives
agree, and the machine. GPT-2 with Conv1D and fused q, k, v cannot be divided by mist apply, so the
GPT models are drawn without tensor parallelism.
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from mist.errors import MistError
from mist.plans.plan import Offload, Plan
from mist.plans.workload import ScheduleKind
from mist.rules.apply import refuse_unplayable
from mist.workflow.checking import HandLayout, check_layout
from mist.workflow.request import Question
from mist.workflow.verifying import StageVerified, verify_plan

MODELS = {  # largest tensor parallelism, sequence lengths, numbers of GPUs
    "examples/llama3_8b.py": (8, (2048, 4096, 8192), (1, 8, 16, 64, 256, 1024)),
    "llama3-70b": (8, (4096, 8192), (64, 256, 1024)),
    "gpt2-xl": (1, (512, 1024), (1, 4, 16, 64)),
    "gpt3-13b": (1, (1024, 2048), (8, 32, 128)),  # written below
    "examples/my_transformer.py": (8, (1024, 2048), (1, 4, 16, 64)),
}
GPT3_13B = {"model_type": "gpt2", "n_embd": 5120, "n_head": 40, "n_layer": 40, "n_positions": 2048}
INTERLEAVED, ZERO_BUBBLE = ScheduleKind.INTERLEAVED, ScheduleKind.ZERO_BUBBLE
KINDS = [
    *[ScheduleKind.ONE_F_ONE_B] * 3,
    ScheduleKind.GPIPE,
    *[INTERLEAVED] * 3,
    *[ZERO_BUBBLE] * 6,  # most of these draws combine it with what it cannot run with
]
OFFLOADS = [Offload()] * 4 + [
    Offload(optimizer=0.5),
    Offload(activations=0.5),
    Offload(weights=1.0, grads=1.0, optimizer=1.0),
]


def drawn(rng: random.Random) -> Iterator[tuple[str, Plan]]:
    """Plans that mist check can judge and mist apply could run, without end."""
    while True:
        model = rng.choice(list(MODELS))
        most_tp, lengths, numbers = MODELS[model]
        gpus = rng.choice(numbers)
        tp = rng.choice([t for t in (1, 2, 4, 8) if t <= min(most_tp, gpus)])
        pp = rng.choice([p for p in (1, 2, 2, 3, 4, 4, 8) if p * tp <= gpus])
        kind = rng.choice(KINDS) if pp > 1 else ScheduleKind.ONE_F_ONE_B
        layout = HandLayout(
            tp=tp,
            pp=pp,
            zero=rng.randrange(4),
            micro_batch=rng.choice((1, 2, 4)),
            checkpoint=rng.choice(("none", "selective", "full", "3")),
            schedule=kind,
            vpp=rng.choice((2, 2, 3, 4)) if kind is INTERLEAVED else 1,
            offload=rng.choice(OFFLOADS),
        )
        # Schedules that take turns repeat themselves after two rounds, and are dry-run whole.
        rounds = kind in (INTERLEAVED, ZERO_BUBBLE)
        num_micro_batches = pp * rng.choice((1, 2, 3)) if rounds else rng.choice((1, 4, 8, 16))
        question = Question(
            model=model,
            num_gpus=gpus,
            seq_len=rng.choice(lengths),
            global_batch=gpus // (tp * pp) * layout.micro_batch * num_micro_batches,
        )
        try:
            plan = check_layout(question, layout).plan
            refuse_unplayable(plan, None)
        except MistError:
            continue
        yield describe(question, layout), plan


def describe(question: Question, layout: HandLayout) -> str:
    away = ", ".join(f"{k} {v:g}" for k, v in vars_of(layout.offload).items() if v)
    words = [
        f"{Path(str(question.model)).stem} on {question.num_gpus}",
        f"seq {question.seq_len}",
        f"pp{layout.pp} tp{layout.tp} zero{layout.zero} mb{layout.micro_batch}",
        f"{layout.checkpoint}",
        *([str(layout.schedule)] if layout.pp > 1 else []),
        *([f"vpp{layout.vpp}"] if layout.vpp > 1 else []),
        *([f"offload {away}"] if away else []),
    ]
    return ", ".join(words)


def vars_of(offload: Offload) -> dict[str, float]:
    return {name: getattr(offload, name) for name in Offload.__dataclass_fields__}


def ends(plan: Plan) -> tuple[int, ...]:
    return tuple(sorted({0, len(plan.stages) - 1}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--plans", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--skip", type=int, default=0, help="of the plans drawn first")
    asked = parser.parse_args()
    print("| plan | stage | seen GiB | predicted GiB | differs | collectives | s |")
    print("|---|---|---|---|---|---|---|")
    file = Path(tempfile.mkdtemp(prefix="mist-")) / "gpt3-13b.json"
    file.write_text(json.dumps(GPT3_13B))
    MODELS[str(file)] = MODELS.pop("gpt3-13b")
    errors: list[float] = []
    wrong = done = 0
    for words, plan in islice(drawn(random.Random(asked.seed)), asked.skip, None):
        start = time.perf_counter()
        try:
            stages: tuple[StageVerified, ...] = verify_plan(plan, stages=ends(plan)).stages
        except MistError as error:
            print(f"<!-- {words}: {str(error).splitlines()[-1]} -->", flush=True)
            continue
        seconds = time.perf_counter() - start
        for index, stage in zip(ends(plan), stages, strict=True):
            errors.append(abs(stage.difference_ratio))
            odd = [
                f"{r.axis} {r.kind} {r.issued}/{r.charged}"
                for r in stage.collectives
                if not r.agrees
            ]
            wrong += bool(odd)
            print(
                f"| {words} | {index} | {stage.seen.peak_bytes / 2**30:.3f} | "
                f"{stage.predicted_bytes / 2**30:.3f} | {stage.difference_ratio:+.1%} | "
                f"{'; '.join(odd) or 'equal'} | {seconds:.0f} |",
                flush=True,
            )
        done += 1
        if done == asked.plans:
            break
    rss = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(
        f"\n{done} plans, {len(errors)} stages: median {statistics.median(errors):.2%}, largest "
        f"{max(errors):.2%}; collectives differ in {wrong}. Largest process {rss:.2f} GiB. "
        f"{platform.machine()}, {os.cpu_count()} cores."
    )


if __name__ == "__main__":
    main()
