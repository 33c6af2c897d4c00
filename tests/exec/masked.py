"""One rank of a batch of layouts: loss and gradients of masked labels, against one process.

One process has all samples of the step in one batch, and its loss is written out here: the sum of
the losses of the unmasked tokens, divided by their number.
"""

import sys
import traceback
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from mist.exec.build.empty_weights import load
from mist.exec.build.parallel import Parallel, build
from mist.plans.workload import Attention
from tests.exec.double import in_double, wide
from tests.exec.drawn import whole_values
from tests.exec.layouts import BATCH, SEQ_LEN, VOCAB, Variant, plan_of
from tests.exec.masked_layouts import LAYOUTS, MORE
from tests.exec.parity import SEED, settings, whole_of, write_errors
from tests.exec.subjects import known_subject

Batch = dict[str, torch.Tensor]
Known = tuple[float, dict[str, torch.Tensor]]  # loss, and gradient of every parameter


def batches(name: str) -> tuple[Batch, Batch]:
    """Two steps: masked unevenly, whole samples and micro-batches too; and without any label."""
    torch.manual_seed(SEED)
    ids = torch.randint(0, VOCAB, (BATCH, SEQ_LEN))
    lengths = torch.randint(2, SEQ_LEN + 1, (BATCH, 1))
    places = torch.arange(SEQ_LEN).expand(BATCH, SEQ_LEN)
    learned = (places < lengths) & (torch.rand(BATCH, SEQ_LEN) < torch.rand(BATCH, 1))
    learned[:4] = learned[9] = learned[14] = False
    learned[5, 0] = learned[6, 0] = True  # causal models of Hugging Face do not count the first
    batch = {"input_ids": ids, "labels": ids.where(learned, -100)}
    if "padded" in name:
        batch["attention_mask"] = (places < lengths).long()
    if "packed" in name:
        batch["position_ids"] = places % 11
    return batch, {**batch, "labels": torch.full_like(ids, -100)}


@cache
def one_process(source: str, kind: str) -> tuple[Known, Known]:
    """What one process gets in both steps."""
    first, second = (_one_step(source, batch) for batch in batches(kind))
    return first, second


def _one_step(source: str, batch: Batch) -> Known:
    model, pristine = (wide(load(source, Attention.FLASH)).module for _ in range(2))
    shared: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        values = whole_values(pristine, name, SEED)
        for own, parameter in list(module.named_parameters(recurse=False)):
            new = shared.setdefault(id(parameter), nn.Parameter(values[own].clone()))
            setattr(module, own, new)
    causal = hasattr(model, "loss_function")
    inputs: dict[str, object] = {**batch}
    if causal:
        del inputs["labels"]
        inputs["use_cache"] = False  # with a cache, packed sequences are not told apart
    output = model(**inputs)
    logits = output.logits[:, :-1] if causal else output
    labels = batch["labels"][:, 1:] if causal else batch["labels"]
    learned = labels != -100
    chosen = logits.gather(-1, labels.where(learned, 0).unsqueeze(-1)).squeeze(-1)
    losses = (logits.logsumexp(-1) - chosen)[learned]
    loss = losses.sum() / max(len(losses), 1)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Stopped:
    """Takes the place of the optimizer's step: keeps the gradients that it would have used."""

    def __init__(self, parallel: Parallel) -> None:
        self.parallel = parallel
        self.gradients: dict[str, torch.Tensor] = {}
        parallel.optimizer.step = self  # type: ignore[assignment, method-assign]

    def __call__(self, scale: torch.Tensor) -> None:
        for name, parameter in self.parallel.parameters.items():
            grad = parameter.grad
            assert grad is not None
            self.gradients[name] = whole_of(self.parallel, name, grad) * scale


def errors(variant: Variant, folder: Path, device: torch.device) -> list[dict[str, float]]:
    """Of each step, how far this layout is from one process: the worst over all ranks."""
    plan = plan_of(variant, folder)
    parallel = build(known_subject(plan), plan, device, settings(variant.max_norm), SEED)
    optimizer = Stopped(parallel)
    found = []
    kind = variant.name.split()[-1]
    known = one_process(plan.model.source, kind if kind in ("padded", "packed") else "")
    for batch, (loss, gradients) in zip(batches(kind), known, strict=True):
        norm = torch.stack([grad.square().sum() for grad in gradients.values()]).sum().sqrt().item()
        clip = min(1.0, (variant.max_norm or float("inf")) / (norm + 1e-6))
        step = parallel.train_step(batch)
        worst = torch.tensor(
            [
                abs(step.loss - loss),
                abs(step.norm - norm),
                gradient_error(optimizer.gradients, gradients, clip),
            ]
        )
        worst = worst.nan_to_num(nan=float("inf"))
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        right = {"known_loss": loss, "known_norm": norm}
        found.append(
            {**dict(zip(("loss", "norm", "gradients"), worst.tolist(), strict=True)), **right}
        )
    return found


def gradient_error(
    gradients: Mapping[str, torch.Tensor], known: Mapping[str, torch.Tensor], clip: float
) -> float:
    """Some parameters of one process have none where nothing is learned: zeros."""
    zero = torch.zeros(())
    return max(
        (g - known.get(name, zero) * clip).abs().max().item() for name, g in gradients.items()
    )


def main(folder: Path, out: Path, names: list[str]) -> None:
    variants = [each for each in (*LAYOUTS, *MORE) if each.name in names]
    with in_double():
        write_errors(variants, errors, folder, out)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None
