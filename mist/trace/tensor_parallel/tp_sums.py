"""Whether what a rank has of a sum over the ranks is only ever added, scaled and moved.

A module that needs all tokens and has divided matrices in it (routing with experts) is one region
of tensor parallelism: its result is summed over the ranks where it ends. That is the model's own
result only if everything between those matrices and the end is linear in what they make. Every
forward operation on it is looked up here; one that is not known to be linear is refused.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

import torch
from torch._ops import OpOverloadPacket

from mist.trace.dispatch_call import Call, key_of, tensors_in

aten = torch.ops.aten

# Operands that the result is linear in, taken together; None: all of them.
LINEAR: Final[Mapping[OpOverloadPacket, tuple[str, ...] | None]] = MappingProxyType(
    {
        **dict.fromkeys((aten.add, aten.add_, aten.sub, aten.sub_, aten.cat, aten.stack)),
        **dict.fromkeys((aten.sum, aten.mean, aten.neg, aten.clone, aten._to_copy, aten.copy_)),
        **dict.fromkeys((aten._unsafe_view, aten.constant_pad_nd)),
        **dict.fromkeys((aten.div, aten.div_, aten.masked_fill, aten.masked_fill_), ("self",)),
        **dict.fromkeys((aten.index, aten.index_select, aten.gather), ("self",)),
        **dict.fromkeys((aten.index_add, aten.index_add_), ("self", "source")),
        **dict.fromkeys((aten.index_put, aten.index_put_), ("self", "values")),
        **dict.fromkeys((aten.scatter_add, aten.scatter_add_), ("self", "src")),
        aten.where: ("self", "other"),
    }
)
# Numbers that would be added to each rank's part.
ADDED: Final = frozenset({"other", "self", "value"})
# Linear in each of two operands, with the other one whole.
BILINEAR: Final = frozenset({aten.mul, aten.mul_, aten.mm, aten.bmm})
ZEROS: Final = frozenset({aten.zeros, aten.zeros_like, aten.new_zeros, aten.zero_})
NOT_LINEAR: Final = "is not linear in a sum over the ranks that it reads before it is added up"


@dataclass(slots=True)
class PartialSums:
    """Storages that hold a rank's part of a sum, by key, and those that hold zeros."""

    parts: set[int] = field(default_factory=set)
    zeros: set[int] = field(default_factory=set)

    def begin(self, call: Call) -> None:
        """A product over a divided dimension leaves this rank's part."""
        self.parts |= {key_of(leaf) for leaf in tensors_in(call.out)}

    def end(self, output: object = None) -> bool:
        """The region is left; whether the first tensor of its output is a sum, if any was begun."""
        first = next(tensors_in(output), None)
        summed = not self.parts or (first is not None and key_of(first) in self.parts)
        self.parts.clear()
        self.zeros.clear()
        return summed

    def read(self, call: Call) -> bool:
        """Follow a forward call; whether it is linear in the parts of sums that it reads."""
        operands = dict(_operands(call))
        results = {key_of(leaf) for leaf in tensors_in(call.out)}
        summed = {name for name, key in operands.items() if key in self.parts}
        if summed:
            self.parts |= results
            return call.func.is_view or self._is_linear(call, operands, summed)
        if not call.func.is_view:
            # A storage that is written anew, or has the address of a freed one, is no part of a
            # sum.
            self.parts -= results
            self.zeros -= results
            self.zeros |= results if call.func.overloadpacket in ZEROS else set()
        return True

    def _is_linear(self, call: Call, operands: Mapping[str, int], summed: set[str]) -> bool:
        packet = call.func.overloadpacket
        if packet in BILINEAR:
            return len(summed) == 1
        if packet not in LINEAR:
            return False
        names = LINEAR[packet]
        together = {n for n in operands if names is None or n.partition(".")[0] in names}
        whole = {name for name in together - summed if operands[name] not in self.zeros}
        return summed <= together and not whole and not _adds_number(call)


def _adds_number(call: Call) -> bool:
    """Whether a number other than zero is added; those that `div` takes scale."""
    if call.func.overloadpacket in (aten.div, aten.div_):
        return False
    numbers = (value for name, value in call.arguments.items() if name in ADDED)
    return any(isinstance(value, int | float) and value != 0 for value in numbers)


def _operands(call: Call) -> Iterator[tuple[str, int]]:
    """The storages of a call's tensors; those in a list are numbered."""
    for name, value in call.arguments.items():
        for index, leaf in enumerate(tensors_in(value)):
            yield f"{name}.{index}", key_of(leaf)
