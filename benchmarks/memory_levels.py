"""What memory levels keep and take on this CPU: the figures of docs/memory-levels.md.

    python -m benchmarks.memory_levels layers | heads

Layers: bytes by live storages, and processor time of forward and backward, paired with the plain
layer, median of seven. Heads: a process each, peak of resident memory above what it had before.
"""

import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import nn

from mist.layers import RUNGS, head_loss
from tests.layers.test_bytes import LAYERS, MODELS, built, published_shapes, stacked
from tests.trace.real import layer_inputs

ROUNDS = 7
ROWS, WIDTH, WORDS = 2048, 256, 65536
HEADS = ("baseline", "eager", "checkpointed", "in-forward")


def seconds(layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> float:
    """Processor time of one forward and backward pass."""
    x = args[0].detach().requires_grad_()  # type: ignore[attr-defined]
    start = time.process_time()
    y = layer(x, *args[1:], **kwargs)
    (y[0] if isinstance(y, tuple) else y).sum().backward()
    return time.process_time() - start


def layers() -> None:
    """One row a model and level."""
    MODELS.update(published_shapes())
    for family in ("llama", "gpt2", "bert"):
        path, plain = LAYERS.get(family, "model.layers"), None
        for level, masks in (
            *((level, "byte") for level in ("none", *RUNGS)),
            ("drop-norm", "bit"),
        ):
            model = built(family, level, masks, torch.bfloat16, "cpu")  # type: ignore[arg-type]
            _, alive, activation = stacked(model, path, 1, 512)
            layer = model.get_submodule(f"{path}.0")
            ids = {"input_ids": torch.zeros(1, 512, dtype=torch.int64)}
            inputs = layer_inputs(
                model, layer, ids | ({} if family == "bert" else {"use_cache": False})
            )
            plain = plain or layer
            ratios = [seconds(layer, *inputs) / seconds(plain, *inputs) for _ in range(ROUNDS)]
            print(
                f"{family:6} {level:16} {masks:5} {alive / activation:6.2f} bytes per b*s*h "
                f"{statistics.median(ratios):5.2f} of the time",
                flush=True,
            )


def head(mode: str) -> None:
    """Loss, gradients and peak memory of one head, in this process."""
    torch.manual_seed(0)
    x = torch.randn(ROWS, WIDTH).bfloat16().requires_grad_()
    weight = (0.05 * torch.randn(WORDS, WIDTH)).bfloat16().requires_grad_()
    target = torch.randint(0, WORDS, (ROWS,))
    weight.sum().backward()  # a training step has a gradient of the weight anyway
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if mode != "baseline":
        weight.grad = None
        loss = head_loss(x, weight, target, mode=mode)  # type: ignore[arg-type]
        loss.backward()
        print(f"{mode:13} loss {loss.item():.6f} |dx| {x.grad.float().norm():.6e}", end=" ")  # type: ignore[union-attr]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{peak / 1024:.0f} MiB above the baseline, {time.process_time() - start:.2f} s")


def main() -> None:
    """What the first argument names."""
    match sys.argv[1:]:
        case ["layers"]:
            layers()
        case ["heads"]:
            for mode in HEADS:
                command = [sys.executable, "-m", "benchmarks.memory_levels", "head", mode]
                subprocess.run(command, check=True)
        case ["head", mode]:
            head(mode)
        case _:
            raise SystemExit("say: python -m benchmarks.memory_levels layers | heads")


if __name__ == "__main__":
    main()
