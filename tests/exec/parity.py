"""One process against many: the same model, data and steps, and how far apart they end.

Run as a program it is one rank of a batch of variants: one launch serves all of one world size.
"""

import json
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from mist.exec.build.adamw import Settings
from mist.exec.build.batches import Batches
from mist.exec.build.empty_weights import load
from mist.exec.build.flex_on_cpu import flex_on
from mist.exec.build.parallel import Parallel, build
from mist.exec.build.process_group import process_group
from mist.plans.workload import Attention
from mist.trace.models.loader import LoadedModel
from tests.exec.double import MAX_LOSS, MAX_PARAMETER, in_double, wide
from tests.exec.drawn import whole_values
from tests.exec.family_layouts import OF_FAMILIES
from tests.exec.forking import RunRanks
from tests.exec.layouts import Variant, plan_of
from tests.exec.sized_layouts import SIZED, WITH_ENCODER
from tests.exec.subjects import known_subject
from tests.exec.variants import SLOW, VARIANTS

SEED, LR = 7, 1e-3

EVERY = (*VARIANTS, *SLOW, *SIZED, *WITH_ENCODER, *OF_FAMILIES)


def settings(max_norm: float | None) -> Settings:
    return Settings(lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, max_norm=max_norm)


def loaded_of(variant: Variant, folder: Path) -> LoadedModel:
    """The model of a variant, in float64 within `in_double()`."""
    return wide(load(plan_of(variant, folder).model.source, Attention.FLASH))


def precision_of(variant: Variant) -> AbstractContextManager[None]:
    """Within: everything is computed in float64, unless the variant is about rounding."""
    return nullcontext() if variant.rounded else in_double()


def reference(variant: Variant, folder: Path) -> None:
    """What one process gets in float64, by torch's own optimizer, in a file.

    losses and norms [steps], gradients [steps] by name, parameters at the end by name. A variant
    that is rounded begins with the weights that fp32 gives.
    """
    path = reference_path(variant, folder)
    if path.exists():
        return
    with precision_of(variant):
        model, loaded = whole_model(variant, folder)
    with in_double():
        batches = Batches(loaded, plan_of(variant, folder).workload, SEED)
        found = _trained(model, loaded, batches, variant)
    torch.save(found, path)


def whole_model(variant: Variant, folder: Path) -> tuple[nn.Module, LoadedModel]:
    """The model with all the values that the seed gives, widened to float64."""
    loaded, pristine = (loaded_of(variant, folder) for _ in range(2))
    model = loaded.module
    shared: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        values = whole_values(pristine.module, name, SEED)
        for own, parameter in list(module.named_parameters(recurse=False)):
            value = nn.Parameter(values[own].double(), parameter.requires_grad)
            new = shared.setdefault(id(parameter), value)
            setattr(module, own, new)
    model.double()
    return model, loaded


def _trained(
    model: nn.Module, loaded: LoadedModel, batches: Batches, variant: Variant
) -> dict[str, Any]:
    given = settings(variant.max_norm)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=given.lr, betas=given.betas, weight_decay=given.weight_decay
    )
    found: dict[str, Any] = {"losses": [], "norms": [], "gradients": []}
    for step in range(variant.num_steps):
        with flex_on(torch.device("cpu"), model.modules()):
            loss = loaded.run(batches.step(step))
            loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), given.max_norm or math.inf)
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(loss.item())
        found["norms"].append(norm.item())
        found["gradients"].append(gradients)
    return {**found, "parameters": {n: p.detach() for n, p in model.named_parameters()}}


def reference_path(variant: Variant, folder: Path) -> Path:
    kind = ("" if variant.max_norm is None else "-clipped") + "-rounded" * variant.rounded
    return folder / f"reference-{Path(variant.model).stem}{kind}-{variant.num_steps}.pt"


def run_variants(
    variants: Sequence[Variant], folder: Path, run: RunRanks
) -> Mapping[str, Mapping[str, float]]:
    """The errors of variants of one world size, by name; in one launch."""
    for variant in variants:
        reference(variant, folder)
    names = [variant.name for variant in variants]
    world_size = variants[0].world_size
    out = folder / f"results-{world_size}.json"
    run("tests.exec.parity", folder, out, *names, num_ranks=world_size)
    found: dict[str, dict[str, float]] = json.loads(out.read_text())
    return found


def far(found: Mapping[str, Mapping[str, float]]) -> dict[tuple[str, str], float]:
    """The errors of variants in float64 that are no rounding."""
    return {
        (name, what): error
        for name, errors_of_one in found.items()
        for what, error in errors_of_one.items()
        if not error <= (MAX_PARAMETER if what == "parameters" else MAX_LOSS)
    }


def errors(variant: Variant, folder: Path, device: torch.device) -> dict[str, float]:
    """Train a variant on this rank; the largest differences over all ranks."""
    known = torch.load(reference_path(variant, folder), weights_only=False)
    plan = plan_of(variant, folder)
    with precision_of(variant):
        subject = known_subject(plan)
        parallel = build(subject, plan, device, settings(variant.max_norm), SEED)
        gradients = watch_gradients(parallel, known["gradients"])
        batches = Batches(subject.loaded, plan.workload, SEED)
        steps = [parallel.train_step(batches.step(step)) for step in range(variant.num_steps)]
    worst = {
        "loss": farthest([step.loss for step in steps], known["losses"]),
        "norm": farthest([step.norm for step in steps], known["norms"]),
        "gradients": max(gradients),
        "parameters": difference(parallel, parallel.parameters, known["parameters"]),
    }
    highest = torch.tensor(list(worst.values()), dtype=torch.float64)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return dict(zip(worst, highest.tolist(), strict=True))


def farthest(values: Sequence[float], known: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(values, known, strict=True))


def watch_gradients(parallel: Parallel, known: Sequence[Mapping[str, torch.Tensor]]) -> list[float]:
    """A list that gets, before each optimizer step, how far gradients are from known ones."""
    found: list[float] = []
    step = parallel.optimizer.step

    def compared(scale: torch.Tensor) -> None:
        held = {n: p.grad for n, p in parallel.parameters.items() if p.grad is not None}
        assert set(held) == {n for n, p in parallel.parameters.items() if p.requires_grad}
        gradients = {name: grad * scale.to(grad.device) for name, grad in held.items()}
        found.append(difference(parallel, gradients, known[len(found)]))
        step(scale)

    parallel.optimizer.step = compared  # type: ignore[method-assign]
    return found


def difference(
    parallel: Parallel, mine: Mapping[str, torch.Tensor], known: Mapping[str, torch.Tensor]
) -> float:
    """The largest difference of any number; all ranks of a stage call it together."""
    errors = (whole_of(parallel, name, value) - known[name] for name, value in mine.items())
    return max((error.abs().max().item() for error in errors), default=0.0)


def whole_of(parallel: Parallel, name: str, value: torch.Tensor) -> torch.Tensor:
    """A tensor of a parameter as one process has it; all ranks of a stage call it together."""
    value = value.detach()
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    matrices = parallel.side_by_side.get(name)
    return whole if matrices is None else matrices.restored(whole)


def write_errors(
    variants: Sequence[Variant],
    errors_of: Callable[[Variant, Path, torch.device], object],
    folder: Path,
    out: Path,
) -> None:
    """What each variant comes to, by name, written by rank 0; one that fails is named."""
    found: dict[str, object] = {}
    with process_group(300.0) as device:
        _divide_looking(variants, folder)
        for variant in variants:
            try:
                found[variant.name] = errors_of(variant, folder, device)
            except Exception:
                print(f"variant {variant.name}", file=sys.stderr)
                raise
        if dist.get_rank() == 0:
            out.write_text(json.dumps(found))
        dist.barrier()


def _divide_looking(variants: Sequence[Variant], folder: Path) -> None:
    """Each rank looks at models of its own first, and then knows what the others have found."""
    models = {(variant.model, variant.stages[0].tp): variant for variant in variants}
    for variant in [*models.values()][dist.get_rank() :: dist.get_world_size()]:
        with precision_of(variant):
            known_subject(plan_of(variant, folder))


def main(folder: Path, out: Path, names: Sequence[str]) -> None:
    known = {variant.name: variant for variant in EVERY}
    write_errors([known[name] for name in names], errors, folder, out)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None
