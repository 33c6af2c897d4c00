"""Puts fake tensors in the place of a model's parameters and buffers for the time of a run."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from mist.plans.workload import Precision
from mist.trace.expressions import Size, Symbols

DTYPES: Final = {
    Precision.BF16: torch.bfloat16,
    Precision.FP16: torch.float16,
    Precision.FP32: torch.float32,
}

LocalShape = Callable[[torch.Tensor], tuple[Size, ...] | None]


class Fakes:
    """Fake copies of tensors, one each however often a tensor is used.

    Parameters take the traced precision, from whichever floating-point dtype they were built in (8
    bits excepted: those are codes); buffers keep theirs, as under FSDP2's mixed precision.
    `local_shape` gives the shape of a rank's shard.
    """

    def __init__(self, symbols: Symbols, dtype: torch.dtype, local_shape: LocalShape) -> None:
        self._symbols = symbols
        self._dtype = dtype
        self._local_shape = local_shape
        self._copies: dict[int, torch.Tensor] = {}
        self._originals: dict[int, torch.Tensor] = {}

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fake copy of a parameter, buffer or constant."""
        if id(tensor) not in self._copies:
            copy = self._copy(tensor)
            self._copies[id(tensor)] = copy
            self._originals[copy.untyped_storage()._cdata] = tensor
        return self._copies[id(tensor)]

    @property
    def copies(self) -> Iterable[torch.Tensor]:
        """All fake copies."""
        return self._copies.values()

    @property
    def originals(self) -> dict[int, torch.Tensor]:
        """Storage of a fake copy -> the tensor it stands for."""
        return self._originals

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        shape = self._local_shape(tensor)
        if not isinstance(tensor, nn.Parameter):
            return self._empty(tensor, tensor.dtype, shape)
        cast = tensor.is_floating_point() and tensor.element_size() > 1
        copy = self._empty(tensor, self._dtype if cast else tensor.dtype, shape)
        return nn.Parameter(copy, requires_grad=tensor.requires_grad)

    def _empty(
        self, like: torch.Tensor, dtype: torch.dtype, shape: tuple[Size, ...] | None
    ) -> torch.Tensor:
        with self._symbols.mode:
            if shape is not None:
                return torch.empty(shape, dtype=dtype, device="cpu")
            # Strides decide which operations make copies.
            return torch.empty_strided(like.shape, like.stride(), dtype=dtype, device="cpu")


@contextmanager
def fake_tables(modules: Iterable[nn.Module], fakes: Fakes) -> Iterator[None]:
    """Within: the modules' own parameters, buffers and tensor attributes are fake."""
    # Only tensors of the module itself: its children are among the modules.
    tables = [table for m in modules for table in tables_of(m)]
    before = [{k: v for k, v in t.items() if _holds_tensors(v)} for t in tables]
    for table, tensors in zip(tables, before, strict=True):
        table.update(tree_map_only(torch.Tensor, fakes.of, tensors))
    try:
        yield
    finally:
        for table, tensors in zip(tables, before, strict=True):
            table.update(tensors)


def _holds_tensors(value: object) -> bool:
    """Whether a value is a tensor or a list of tensors, as recurrent modules have of parameters."""
    values = value if isinstance(value, list) else [value]
    return len(values) > 0 and all(isinstance(each, torch.Tensor) for each in values)


def tables_of(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Where a module itself keeps tensors: parameters, buffers, attributes."""
    yield module._parameters
    yield module._buffers
    yield vars(module)
