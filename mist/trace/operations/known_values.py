"""Values that are known without any numbers: masks of ones, valid labels, checks that pass.

Nothing is padded and nothing is ignored in a batch of the asked size. So a mask that is made of
ones is all ones, the integers of a batch (tokens, labels) are no negative numbers, and those of
them that differ from some number (a blank, a padding) are all of them, at the most. What such a
mask selects is everything. Differences (distances of tokens) may be negative: nothing is known.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from mist.trace.dispatch_call import key_of
from mist.trace.operations.value_checks import passing_value

aten = torch.ops.aten


class KnownValues:
    """Remembers tensors that are all ones, as long as they live, and answers from them."""

    def __init__(self) -> None:
        self._ones = WeakTensorKeyDictionary()
        # Masks of valid integers, with the storage of the tensor that they were asked of.
        self._valid = WeakTensorKeyDictionary()
        # Integers that may be negative, by storage: what is computed of a difference is one, too.
        self._signed: dict[int, StorageWeakRef] = {}

    def are_ones(self, tensor: object) -> bool:
        """Whether a tensor is known to be all ones."""
        return isinstance(tensor, torch.Tensor) and tensor in self._ones

    def answer(self, func: OpOverload, args: tuple[Any, ...]) -> object:
        """What a call gives by what is known; None: it is to be made."""
        if func is aten._local_scalar_dense.default and args[0].dtype is torch.bool:
            return passing_value()
        if func in SELECTIONS:
            mask = _mask_of(args[1])
            if mask is not None and (self.are_ones(mask) or self._is_own(mask, args[0])):
                return args[0].new_empty((mask.numel(), *args[0].shape[mask.dim() :]))
        return None

    def _is_own(self, mask: torch.Tensor, tensor: torch.Tensor) -> bool:
        """Whether a mask says which numbers of this tensor are valid."""
        return mask in self._valid and self._valid[mask].cdata == key_of(tensor)

    def note(self, func: OpOverload, args: tuple[Any, ...], out: object) -> None:
        """Remember what a call gave, if it is all ones or says what is valid."""
        if func is aten.ne.Scalar and _are_integers(args[0]):
            self._valid[out] = StorageWeakRef(args[0].untyped_storage())
        if func in BOTH and all(mask in self._valid for mask in args):
            self._note_both(args, out)
        if func.overloadpacket is aten.ones or self._are_all(func, args):
            self._ones[out] = None
        if isinstance(out, torch.Tensor) and _are_integers(out):
            self._note_sign(func, args, out)

    def _note_both(self, masks: tuple[Any, ...], out: object) -> None:
        first, second = (self._valid[mask] for mask in masks)
        if first.cdata == second.cdata:
            self._valid[out] = first

    def _note_sign(self, func: OpOverload, args: tuple[Any, ...], out: torch.Tensor) -> None:
        if func.overloadpacket in DIFFERENCES or any(map(self._may_be_negative, args)):
            self._signed[key_of(out)] = StorageWeakRef(out.untyped_storage())

    def _may_be_negative(self, value: object) -> bool:
        return isinstance(value, torch.Tensor) and key_of(value) in self._signed

    def _are_all(self, func: OpOverload, args: tuple[Any, ...]) -> bool:
        """Whether no number that is not negative fails a comparison: x > -1, x >= 0, x != -100."""
        return (
            func in COMPARISONS
            and _are_integers(args[0])
            and not self._may_be_negative(args[0])
            and isinstance(args[1], int)
            and args[1] <= COMPARISONS[func]
        )


def _are_integers(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.int32, torch.int64)


def _mask_of(selection: Any) -> Any:  # noqa: ANN401 (a mask, or indices of any kind)
    """The mask that is the only index, or alone."""
    alone = isinstance(selection, list) and len(selection) == 1
    mask = selection[0] if alone else selection
    is_mask = isinstance(mask, torch.Tensor) and mask.dtype is torch.bool
    return mask if is_mask else None


SELECTIONS: Final = frozenset({aten.masked_select.default, aten.index.Tensor})
BOTH: Final = frozenset({aten.bitwise_and.Tensor, aten.logical_and.default})
DIFFERENCES: Final = frozenset({aten.sub, aten.sub_, aten.rsub, aten.neg, aten.neg_})
COMPARISONS: Final[Mapping[OpOverload, int]] = MappingProxyType(
    {aten.gt.Scalar: -1, aten.ge.Scalar: 0, aten.ne.Scalar: -1}
)
