"""Mixed precision by torch.autocast: parameters stay fp32, each operation has its own precision.

Torch's own CPU autocast runs under both policies: it casts the inputs of matrix products and keeps
one copy of each weight. CUDA's list of operations that run in fp32 is longer than the CPU's; under
policy "cuda" the rest of it is imitated where functions are called. Source: "CUDA Ops that Autocast
to float32" in torch's documentation of automatic mixed precision (torch.amp).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

HALF: Final = (torch.bfloat16, torch.float16)
IN_FP32: Final = (
    "__pow__", "__rdiv__", "__rpow__", "__rtruediv__", "acos", "asin", "cosh", "cosine_similarity",
    "cross_entropy", "cumprod", "cumsum", "dist", "erfinv", "exp", "expm1", "group_norm", "kl_div",
    "l1_loss", "layer_norm", "log", "log10", "log_softmax", "log1p", "log2", "mse_loss",
    "nll_loss", "norm", "normalize", "pow", "prod", "reciprocal", "rsqrt", "sinh",
    "smooth_l1_loss", "softmax", "softmin", "softplus", "sum", "tan",
)  # fmt: skip


@contextmanager
def forward_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Within: autocast to `dtype`; None for no autocast."""
    if dtype is None:
        yield
        return
    with torch.autocast("cpu", dtype=dtype):
        yield


@contextmanager
def outside(dtype: torch.dtype | None) -> Iterator[None]:
    """Within: as after the end of autocast, which backward runs behind."""
    if dtype is None:
        yield
        return
    # Behind the forward pass only autograd holds the casts of weights.
    torch.clear_autocast_cache()
    with torch.autocast("cpu", enabled=False):
        yield


def in_fp32() -> Mapping[object, Callable[..., object]]:
    """What CUDA's autocast runs in fp32, by every name under which torch has it."""
    owners = (torch, torch.Tensor, F)
    functions = {getattr(owner, name, None) for name in IN_FP32 for owner in owners}
    return {func: _widened(func) for func in functions if func is not None}


def _widened(func: Callable[..., object]) -> Callable[..., object]:
    def call(*args: object, **kwargs: object) -> object:
        wide_args, wide_kwargs = tree_map(_wide, (args, kwargs))
        return func(*wide_args, **wide_kwargs)

    return call


def _wide(value: object) -> object:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in HALF else value
