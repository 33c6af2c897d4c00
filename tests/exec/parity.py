"""One process against many: the same model, data and steps, and how far apart they end.

Run as a program it is one rank of a batch of variants: one launch serves all of one world size.
"""

import json
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from mist.exec.adamw import Settings
from mist.exec.anatomy import examine
from mist.exec.batches import Batches
from mist.exec.group import joined
from mist.exec.launch import run_ranks
from mist.exec.loading import load
from mist.exec.parallel import Parallel, build, subject_of
from mist.exec.weights import whole_values
from mist.spec import Attention
from tests.exec.layouts import SEQ_LEN, Variant, plan_of
from tests.exec.variants import SLOW, VARIANTS

NUM_STEPS, SEED, LR = 3, 7, 1e-3


def settings(max_norm: float | None) -> Settings:
    return Settings(lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, max_norm=max_norm)


def reference(variant: Variant, folder: Path) -> None:
    """What one process gets, by torch's own optimizer: losses and parameters, in a file."""
    path = reference_path(variant, folder)
    if path.exists():
        return
    plan = plan_of(variant, folder)
    loaded = load(plan.model.source, Attention.FLASH)
    model, pristine = loaded.module, load(plan.model.source, Attention.FLASH).module
    shared: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        values = whole_values(pristine, name, SEED)
        for own, parameter in list(module.named_parameters(recurse=False)):
            value = nn.Parameter(values[own].clone(), parameter.requires_grad)
            new = shared.setdefault(id(parameter), value)
            setattr(module, own, new)
    batches = Batches(loaded, plan.workload, SEED)
    given = settings(variant.max_norm)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=given.lr, betas=given.betas, weight_decay=given.weight_decay
    )
    losses = []
    for step in range(NUM_STEPS):
        loss = loaded.run(batches.step(step))
        loss.backward()
        if given.max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), given.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    torch.save({"losses": losses, "parameters": dict(model.named_parameters())}, path)


def reference_path(variant: Variant, folder: Path) -> Path:
    clipped = "" if variant.max_norm is None else "-clipped"
    return folder / f"reference-{Path(variant.model).stem}{clipped}.pt"


def run_variants(variants: Sequence[Variant], folder: Path) -> Mapping[str, Mapping[str, float]]:
    """The errors of variants of one world size, by name; in one launch."""
    for variant in variants:
        reference(variant, folder)
    names = [variant.name for variant in variants]
    world_size = variants[0].world_size
    out = folder / f"results-{world_size}.json"
    command = ["-m", "tests.exec.parity", str(folder), str(out), *names]
    run_ranks(command, world_size, timeout_s=60.0 + 20.0 * len(names))
    found: dict[str, dict[str, float]] = json.loads(out.read_text())
    return found


def errors(variant: Variant, folder: Path, device: torch.device) -> dict[str, float | str]:
    """Train a variant on this rank; the largest differences over all ranks."""
    begin = time.perf_counter()
    plan = plan_of(variant, folder)
    loaded = load(plan.model.source, Attention.FLASH)
    subject = subject_of(loaded, examine(loaded, SEQ_LEN), plan)
    parallel = build(subject, plan, device, settings(variant.max_norm), SEED)
    batches = Batches(loaded, plan.workload, SEED)
    losses = [parallel.train_step(batches.step(step)).loss for step in range(NUM_STEPS)]
    known = torch.load(reference_path(variant, folder), weights_only=False)
    worst = torch.tensor(
        [
            max(abs(a - b) for a, b in zip(losses, known["losses"], strict=True)),
            parameter_error(parallel, known["parameters"]),
        ]
    )
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    seconds = time.perf_counter() - begin
    return {"loss": worst[0].item(), "parameters": worst[1].item(), "seconds": seconds}


def parameter_error(parallel: Parallel, known: Mapping[str, torch.Tensor]) -> float:
    worst = 0.0
    for name, parameter in parallel.parameters.items():
        value = parameter.detach()
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        worst = max(worst, (whole - known[name]).abs().max().item())
    return worst


def main(folder: Path, out: Path, names: Sequence[str]) -> None:
    found: dict[str, object] = {}
    with joined(25.0) as device:
        for name in names:
            variant = next(v for v in (*VARIANTS, *SLOW) if v.name == name)
            try:
                found[name] = errors(variant, folder, device)
            except Exception:
                print(f"variant {name}", file=sys.stderr)
                raise
        if dist.get_rank() == 0:
            out.write_text(json.dumps(found))
        dist.barrier()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None
