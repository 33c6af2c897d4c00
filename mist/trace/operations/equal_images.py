"""Images of one size on fake tensors: what a model reads off values that are known beforehand.

Models that take images of any size read grids and masks: how many patches an image has, which
images are padding, which tokens stand for an image. A batch here has images of one size, none of
them padding, and a placeholder for each of their tokens. Then sizes follow from numbers of images:
a list of sizes is so many equal parts, a table over grids grows by the same rows for each image.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final, cast
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from mist.trace.expressions import Size
from mist.trace.operations.model_functions import functions_of

CHECK: Final = "torch_compilable_check"  # that there are as many placeholders as image tokens
OF_GRIDS: Final = "transformers.vision_utils"  # functions of the grids of all images
POSITIONS: Final = "get_rope_index"  # a method: of each token in time, height and width
MASKING, MASK_ARGUMENTS = "transformers.masking_utils", "_preprocess_mask_arguments"
PADDING: Final = "attention_mask"
LEAST_DIMS: Final = 3  # of a stack of images or of their masks


class EqualParts:
    """In the place of a list of sizes that only values know: `count` equal ones."""

    def __init__(self, count: Size) -> None:
        self.count = count

    def of(self, tensor: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
        """The parts of a tensor along a dimension, all in one: as its samples, if it has one."""
        if dim == 0 or tensor.shape[0] != 1:
            return (tensor,)
        parts = tensor.unflatten(dim, (self.count, tensor.shape[dim] // self.count))
        return (parts.squeeze(0).movedim(dim - 1, 0),)


class _Values(TorchFunctionMode):
    """Calls that need values of fake tensors. `_tokens`: how many stand for images, once known."""

    def __init__(self) -> None:
        super().__init__()
        self._tokens: Size = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name == "split" and len(args) > 1 and isinstance(args[1], EqualParts):
            dim = (*args[2:], *kwargs.values(), 0)[0]
            return args[1].of(args[0], dim % args[0].dim())
        if name in ("masked_scatter", "masked_scatter_"):
            source = args[2]
            self._tokens = source.numel() // source.shape[-1]
        if name in ("__getitem__", "__setitem__") and (mask := _mask_of(args[1])) is not None:
            args = (args[0], self._known(args[0], mask, args[1]), *args[2:])
        return func(*args, **kwargs)

    def _known(self, tensor: torch.Tensor, mask: torch.Tensor, index: object) -> object:
        """The index that picks as many rows as a mask of images, or of their tokens, does."""
        if mask.dim() == 1 and tensor.dim() >= LEAST_DIMS:  # there is no padding
            return torch.arange(mask.shape[0])
        if mask.dim() == 2 and self._tokens:  # of samples and tokens
            return tuple(torch.arange(cast(int, self._tokens)) for _ in range(mask.dim()))
        return index


def _mask_of(index: object) -> torch.Tensor | None:
    """The mask that an index begins with, and whose values nobody knows."""
    first = index[0] if isinstance(index, tuple) and index else index
    return first if isinstance(first, FakeTensor) and first.dtype == torch.bool else None


@contextmanager
def equal_images(
    modules: Iterable[nn.Module], batch: Mapping[str, object], grid: Sequence[int] | None
) -> Iterator[None]:
    """Within: modules run on a batch of fake tensors as if they knew its values.

    `grid`: of each image, as the model takes it (frames, rows, columns); None where it takes none.
    """
    modules = list(modules)
    with ExitStack() as stack:
        for table, name, function in functions_of(modules):
            if function.__name__ == CHECK:
                stack.enter_context(patch.dict(table, {name: _nothing}))
            elif grid is not None and function.__module__ == OF_GRIDS:
                known = _OfGrids(function, grid)
                stack.enter_context(patch.dict(table, {name: known}))
        for module in modules:
            if hasattr(module, POSITIONS):
                stack.enter_context(patch.dict(vars(module), {POSITIONS: _positions}))
        # A method of Python, which no mode sees.
        parts = _as_parts(FakeTensor.tolist)
        stack.enter_context(patch.object(FakeTensor, "tolist", parts))
        stack.enter_context(_Values())
        if (masking := sys.modules.get(MASKING)) is not None and PADDING not in batch:
            arguments = partial(_without_padding, getattr(masking, MASK_ARGUMENTS))
            stack.enter_context(patch.object(masking, MASK_ARGUMENTS, arguments))
        yield


def _without_padding(
    mask_arguments: Callable[..., object],
    config: object,
    embeds: object,
    mask: object,
    *rest: object,
) -> object:
    """A mask of padding masks nothing here; with real tensors transformers sees that."""
    is_padding = isinstance(mask, FakeTensor) and mask.dim() == 2
    return mask_arguments(config, embeds, None if is_padding else mask, *rest)


def _as_parts(numbers: Callable[..., Any]) -> Callable[..., Any]:
    """`tolist` of fake tensors; of a list of numbers it says how many there are."""

    def tolist(tensor: torch.Tensor) -> object:
        return EqualParts(tensor.shape[0]) if tensor.dim() == 1 else numbers(tensor)

    return tolist


def _positions(ids: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor, ...]:
    """Positions [3, b, s], and how far the last of a sample is from its number of tokens [b, 1]."""
    return ids.new_empty((3, *ids.shape)), ids.new_empty((ids.shape[0], 1))


def _nothing(*args: object, **kwargs: object) -> None:
    """A check of values, which hold."""


class _OfGrids:
    """A function of the grids of all images, whose results have the same rows for each of them."""

    def __init__(self, function: Callable[..., Any], grid: Sequence[int]) -> None:
        self._function = function
        self._grid = grid

    def __call__(self, grids: object, *args: object, **kwargs: object) -> object:
        if not isinstance(grids, FakeTensor):
            return self._function(grids, *args, **kwargs)
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            one, two = (
                self._function(torch.tensor([self._grid] * count), *args, **kwargs)
                for count in (1, 2)
            )
        number = grids.shape[0]
        return tree_map(lambda first, second: _extended(first, second, number), one, two)


def _extended(first: object, second: object, number: Size) -> object:
    """What `number` images give where one gives the first and two the second."""
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        return first
    sizes = zip(first.shape, second.shape, strict=True)
    shape = [one + (number - 1) * (two - one) if two != one else one for one, two in sizes]
    return torch.empty(shape, dtype=first.dtype)
