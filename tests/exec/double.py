"""float64 for tests: rounding falls below what any mistake does, and is the same on every CPU.

AdamW divides by the root of tiny second moments, so after a few steps in fp32 parameters measure
in which order a CPU adds up. Plans know no such precision: within `in_double()` what a plan calls
fp32 is float64, in the model, in reductions, and where a model asks for fp32 itself (norms, rotary
tables, the logits of a loss).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

from mist.exec.build import fsdp as zero
from mist.plans.workload import Precision
from mist.trace.models.loader import LoadedModel

MAX_LOSS = 1e-9  # also of gradients and their norm
MAX_PARAMETER = 1e-8  # AdamW divides a difference by at least eps, 1e-8, and multiplies by 1e-3


@contextmanager
def in_double() -> Iterator[None]:
    """Within: what plans and models call fp32 is float64. A model must be made so too (`wide`).

    The names are changed, not the calls (by a function mode): those of a layer that runs again
    within a backward pass would be missed.
    """
    default = torch.get_default_dtype()
    with ExitStack() as changed:
        for owner, name in ((torch, "float32"), (torch, "float"), (torch.Tensor, "float")):
            wide = torch.Tensor.double if owner is torch.Tensor else torch.float64
            changed.enter_context(patch.object(owner, name, wide))
        for table in (zero.COMPUTE, zero.MASTER):
            changed.enter_context(patch.dict(table, {Precision.FP32: torch.float64}))
        changed.enter_context(patch.object(F, "grouped_mm", _grouped_mm))
        changed.callback(torch.set_default_dtype, default)
        torch.set_default_dtype(torch.float64)
        yield


def wide(loaded: LoadedModel) -> LoadedModel:
    """The same with its parameters and buffers, in place, in float64 within `in_double()`."""
    loaded.module.to(torch.get_default_dtype())
    return loaded


_OF_TORCH = F.grouped_mm


def _grouped_mm(x: torch.Tensor, weights: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    """Torch has none in float64: rows of x [n, k] times the matrix [g, k, m] of their group."""
    if isinstance(x, FakeTensor):
        return _OF_TORCH(x, weights, offs=offs)
    counts = offs.diff(prepend=offs.new_zeros(1)).tolist()
    left = x.shape[0] - sum(counts)  # rows of no group
    parts = [rows @ each for rows, each in zip(x.split([*counts, left]), weights, strict=False)]
    return torch.cat([*parts, x.new_zeros(left, weights.shape[-1])])
