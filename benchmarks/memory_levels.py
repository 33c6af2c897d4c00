"""What memory levels keep and take on this CPU: the figures of docs/memory-levels.md.

    python benchmarks/memory_levels.py [heads | layers | errors]

Layers: bytes by live storages, and processor time of forward and backward, paired with the plain
layer, median of seven. Heads: a process each, peak of resident memory above what it had before.
Errors: of the bf16 gradient of all parameters, dropout off, against the same model in fp64.
"""

import copy
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests are not installed
from mist.layers import RUNGS, convert, head_loss
from tests.layers.families import without_dropout
from tests.layers.test_bytes import LAYERS, MODELS, batch_of, built, published_shapes, stacked
from tests.layers.test_surgery import distance, gradient
from tests.trace.real import layer_inputs

ROUNDS = 7
ROWS, WIDTH, WORDS = 2048, 256, 65536
HEADS = ("baseline", "none", "checkpointed", "in-forward")


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
            inputs = layer_inputs(model, layer, batch_of(path, 1, 512))
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
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if mode != "baseline":
        loss = head_loss(x, weight, target, mode=mode)
        loss.backward()
        print(f"{mode:13} loss {loss.item():.6f} |dx| {x.grad.float().norm():.6e}", end=" ")  # type: ignore[union-attr]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{peak / 1024:.0f} MiB above the baseline, {time.process_time() - start:.2f} s")


def heads() -> None:
    """One process a head, as a peak does not fall again."""
    for mode in HEADS:
        subprocess.run([sys.executable, __file__, "head", mode], check=True)


def errors() -> None:
    """One row a model and level."""
    MODELS.update(published_shapes())
    for family in ("llama", "gpt2", "bert"):
        plain = without_dropout(built(family, "none", "byte", torch.bfloat16, "cpu"))
        exact = gradient(copy.deepcopy(plain).double())[1]
        for level in ("none", *RUNGS):
            model = copy.deepcopy(plain)
            if level != "none":
                convert(model, level)
            print(f"{family:6} {level:16} {distance(gradient(model)[1], exact):.2e}", flush=True)


def main() -> None:
    """What the first argument names, or all."""
    match sys.argv[1:]:
        case ["head", mode]:
            head(mode)
        case parts:
            for part in parts or ["heads", "layers", "errors"]:
                {"heads": heads, "layers": layers, "errors": errors}[part]()


if __name__ == "__main__":
    main()
