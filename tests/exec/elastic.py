"""Rank programs about checkpoints: `python -m tests.exec.elastic WHAT DIR` (test_checkpoints).

save: 4 steps under dp 4, a checkpoint after the second; then on from it under other plans; and on
from a checkpoint of one of those.
two: the same on two ranks. die: rank 1 is killed while the second checkpoint is written.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mist.exec.build.process_group import process_group
from mist.exec.run import checkpoints
from mist.exec.run.checkpoint_folder import last_of
from tests.exec.double import in_double
from tests.exec.layouts import S, Variant
from tests.exec.parity import SEED
from tests.exec.running import Run

MAX_NORM = 0.5
FACTS = {"fingerprint": "any", "seed": SEED}
DP4 = Variant(name="dp4", stages=(S(dp=4, zero=3),), micro=8)
OTHERS = (
    Variant(
        name="pp2 tp2",
        stages=(S(layers=(1,), tp=2, zero=1), S(layers=(3,), tp=2, zero=0)),
        micro=4,
    ),
    Variant(name="dp2 tp2 sp", stages=(S(dp=2, tp=2, sp=True, zero=2),), micro=8),
    Variant(name="hsdp", stages=(S(dp=4, dp_replicate=2, zero=2),), micro=8),
)
SIDE_BY_SIDE = {
    f"{model} {name}": Variant(name=name, model=f"{model}.json", stages=stages, micro=8)
    for model in ("gpt2", "qwen3-moe", "phi3")
    for name, stages in {"tp2": (S(tp=2, sp=True),), "dp2": (S(dp=2, zero=3),)}.items()
}
TWO = Variant(name="dp2", stages=(S(dp=2, zero=1),), micro=4)


def save(folder: Path, device: torch.device) -> None:
    run = Run(DP4, folder, device, MAX_NORM, in_double)
    run.train(0, 2)
    checkpoints.save(run.parallel, folder / "checkpoints", FACTS)
    losses = {"dp4": run.train(2, 4)}
    for variant in OTHERS:
        losses[variant.name] = _resumed(variant, folder, device)
    run = Run(OTHERS[-1], folder, device, MAX_NORM, in_double)
    run.train(0, 2)
    checkpoints.save(run.parallel, folder / "copies", FACTS)
    losses["from hsdp"] = _resumed(DP4, folder, device, "copies")
    if dist.get_rank() == 0:
        (folder / "losses.json").write_text(json.dumps(losses))


def side_by_side(folder: Path, device: torch.device) -> None:
    """Matrices side by side (of heads, of experts): saved by any layout, read by all."""
    losses = {}
    for name, variant in SIDE_BY_SIDE.items():
        alike = {other: v for other, v in SIDE_BY_SIDE.items() if v.model == variant.model}
        run = Run(variant, folder, device, MAX_NORM, in_double)
        run.train(0, 2)
        checkpoints.save(run.parallel, folder / name, FACTS)
        losses[name] = [2, *run.train(2, 4)]
        for other, again in alike.items():
            losses[f"{name} to {other}"] = _resumed(again, folder, device, name)
    if dist.get_rank() == 0:
        (folder / "losses.json").write_text(json.dumps(losses))


def two(folder: Path, device: torch.device) -> None:
    losses = _resumed(TWO, folder, device)
    if dist.get_rank() == 0:
        (folder / "two.json").write_text(json.dumps(losses))


def _resumed(
    variant: Variant, folder: Path, device: torch.device, saved: str = "checkpoints"
) -> list[float]:
    run = Run(variant, folder, device, MAX_NORM, in_double)
    last = last_of(folder / saved, FACTS)
    assert last is not None
    done = checkpoints.resume(run.parallel, last)
    return [done, *run.train(done, done + 2)]


def die(folder: Path, device: torch.device) -> None:
    run = Run(TWO, folder, device, MAX_NORM, in_double)
    run.train(0, 1)
    checkpoints.save(run.parallel, folder / "dying", FACTS)
    write = checkpoints.write

    def half(*args: object, **kwargs: object) -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*args, **kwargs)  # type: ignore[arg-type]

    checkpoints.write = half  # type: ignore[assignment]
    run.train(1, 2)
    checkpoints.save(run.parallel, folder / "dying", FACTS)


def recover(folder: Path, device: torch.device) -> None:
    run = Run(TWO, folder, device, MAX_NORM, in_double)
    last = last_of(folder / "dying", FACTS)
    assert last is not None
    assert checkpoints.resume(run.parallel, last) == 1
    run.train(1, 2)
    checkpoints.save(run.parallel, folder / "dying", FACTS)


if __name__ == "__main__":
    programs = {
        "side_by_side": side_by_side,
        "save": save,
        "two": two,
        "die": die,
        "recover": recover,
    }
    place = Path(sys.argv[2])
    with process_group(300.0) as where:
        programs[sys.argv[1]](place, where)
        dist.barrier()
