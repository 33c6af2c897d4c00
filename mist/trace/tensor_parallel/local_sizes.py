"""The numbers in a model's calls that are smaller on a rank: found by what flows, not by names.

In a run on shards a divided dimension has T in its size. The sizes that a call is given are read as
those of the whole model (T = 1); the dimension of the result that takes the place of the divided
one is the first that whole units fit into, in the group of dimensions that the view merges and
splits together. What a call must be given on a rank follows: a share of that dimension, and all of
the others.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import Final

import sympy
import torch
from sympy import Expr
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils.weak import WeakTensorKeyDictionary

from mist.model.graph import B, S, T
from mist.trace.expressions import Size, Symbols
from mist.trace.operations.sized_calls import (
    Args,
    Kwargs,
    LocalNumber,
    Number,
    OperandPart,
    SizedCall,
    SizedCalls,
    SizeRule,
    operands_of,
    sized_call,
    with_operands,
)
from mist.trace.tensor_parallel.tp_sharding import matrix_of

# Numbers that no product of a model's own sizes equals: they order sizes with b and s in them.
LARGE: Final = {B: 1009, S: 100003}
CUTS: Final = frozenset({"split", "split_with_sizes", "chunk", "tensor_split", "__getitem__"})
SAME_RANK: Final = frozenset({"expand", "broadcast_to"})
UNKNOWN: Final = ()  # where the matrices in a wider one begin and end

_Unit = tuple[Expr, Size]  # their number in the whole model, and on a rank


@dataclass(frozen=True, slots=True)
class _Group:
    """Dimensions of a tensor and of its view that hold the same elements."""

    inputs: list[int]
    outputs: list[int]


class LocalSizes(SizedCalls):
    """Gives calls the sizes that a rank has. `rules`: by module, of its calls by number."""

    def __init__(self, symbols: Symbols, units: Mapping[int, torch.SymInt]) -> None:
        super().__init__()
        self.rules: dict[int, dict[int, SizeRule]] = {}
        self._cuts: dict[int, tuple[int, ...]] = {}
        self._copies_cut = False
        self._symbols = symbols
        # By the symbol of torch: a share's size is a multiple of it.
        self._units = {size.node.expr: (sympy.Integer(n), size) for n, size in units.items()}
        self._makers = WeakTensorKeyDictionary()
        self._columns = frozenset[int]()

    @contextmanager
    def within(self, columns: Sequence[nn.Module]) -> Iterator[None]:
        """Within: calls are mended; `columns` are the column-parallel modules."""
        self._columns = frozenset(map(id, columns))
        hooks = [
            register_module_forward_pre_hook(self.enter),
            register_module_forward_hook(self.leave, always_call=True),
            *(m.register_forward_hook(self._made) for m in columns if matrix_of(m) is not None),
        ]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _made(self, module: nn.Module, args: object, output: torch.Tensor) -> None:
        self._makers[_base(output)] = id(module), _whole(self._symbols.expr(output.shape[-1]))

    def mend(
        self, module: nn.Module, number: int, name: str, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        """The arguments on a rank; what is not known to be a size of the whole stays as it is."""
        rules = self.rules.setdefault(id(module), {})
        call = sized_call(name, args, kwargs)
        if call is not None:
            unit, found = self._numbers(call)
            if not found:
                return args, kwargs
            rules[number] = SizeRule(numbers=found, operands={})
            numbers = [
                self._local(size, found[i], unit) if i in found else size
                for i, size in enumerate(call.numbers)
            ]
            return call.rebuild(numbers), {}
        operands = operands_of(name, args, kwargs)
        cut = dict(self._wholes(operands))
        if cut:
            rules[number] = SizeRule(numbers={}, operands={i: part for i, (part, _) in cut.items()})
            # As many elements, without the copy of blocks' parts: at t = 1 there is none.
            parts = {i: operands[i].narrow(part.dim, 0, size) for i, (part, size) in cut.items()}
            return with_operands(args, kwargs, parts)
        return args, kwargs

    def _numbers(self, call: SizedCall) -> tuple[_Unit, dict[int, LocalNumber]]:
        """Which numbers of a call differ on a rank, and of which units its tensor has a share."""
        shape = self._symbols.shape(call.tensor)
        units = [unit for size in call.tensor.shape if (unit := self._unit_of(size))]
        if len(units) != 1:
            return (sympy.S.One, 1), {}
        size = units[0][0]
        if call.name in CUTS:
            return units[0], self._cut(call, shape, size)
        if call.name in SAME_RANK:
            return units[0], self._expanded(call, shape)
        return units[0], self._viewed(call, shape, size)

    def _viewed(self, call: SizedCall, shape: Sequence[Expr], unit: Expr) -> dict[int, LocalNumber]:
        """Of a view: sizes that are not those which the whole model's become on a rank."""
        dims = range(len(shape)) if call.dim is None else [call.dim]
        inputs = [_whole(shape[dim]) for dim in dims]
        outputs = self._resolved(call.numbers, inputs)
        if outputs is None:
            return {}
        divided: set[int] = set()
        for group in _groups(inputs, outputs):
            for place in group.inputs:
                if shape[dims[place]].has(T):
                    taken = next((j for j in group.outputs if _fits(outputs[j], unit)), None)
                    if taken is None:
                        return {}
                    divided.add(taken)
                    before = _before(group, taken, outputs)
                    self._note_pieces(call.tensor, dims[place], _evenly(inputs[place], before))
        return {
            j: found
            for j, size in enumerate(call.numbers)
            if (found := self._differs(size, outputs[j], j in divided)) is not None
        }

    def _differs(self, size: Number, whole: Expr, divided: bool) -> LocalNumber | None:
        """How a size is to be changed; None when a rank has it as it is."""
        if size is None or size == -1:
            return None
        asked = self._symbols.expr(size)
        if sympy.expand(asked - (whole / T if divided else whole)) == 0:
            return None
        if sympy.expand(asked - whole) == 0:
            return LocalNumber(whole=None, divided=True)
        return LocalNumber(whole=int(whole), divided=divided) if whole.is_Integer else None

    def _resolved(self, sizes: Sequence[Number], inputs: Sequence[Expr]) -> list[Expr] | None:
        """The sizes of the whole model's view; None where they do not hold all elements."""
        known = [_whole(self._symbols.expr(s)) if not _open(s) else None for s in sizes]  # type: ignore[arg-type]
        total = prod(inputs, start=sympy.S.One)
        rest = sympy.cancel(total / prod((k for k in known if k is not None), start=sympy.S.One))
        outputs = [rest if size is None else size for size in known]
        equal = sympy.expand(prod(outputs, start=sympy.S.One) - total) == 0
        return outputs if equal and not sympy.fraction(rest)[1].free_symbols else None

    def _expanded(self, call: SizedCall, shape: Sequence[Expr]) -> dict[int, LocalNumber]:
        found: dict[int, LocalNumber] = {}
        first = len(call.numbers) - len(shape)
        for dim, size in enumerate(shape):
            number = call.numbers[first + dim]
            if size.has(T) and not _open(number):
                change = self._differs(number, _whole(size), divided=True)
                if change is not None:
                    found[first + dim] = change
        return found

    def _cut(self, call: SizedCall, shape: Sequence[Expr], unit: Expr) -> dict[int, LocalNumber]:
        """Of a cut along a divided dimension: its sizes or bounds, in whole units."""
        dim = call.dim
        if dim is None or not shape[dim].has(T):
            return {}
        total = _whole(shape[dim])
        if call.name in ("chunk", "tensor_split"):
            if isinstance(call.numbers[0], int):
                self._note_pieces(call.tensor, dim, _evenly(total, sympy.Integer(call.numbers[0])))
            return {}
        sizes = [None if n is None else self._symbols.expr(n) for n in call.numbers]
        whole = [None if n is None else _whole(n) for n in sizes]
        self._note_pieces(call.tensor, dim, _widths(call, whole, total))
        return _shares_of(sizes, unit)

    def _note_pieces(self, tensor: torch.Tensor, dim: int, widths: Sequence[Expr] | None) -> None:
        """Into what a call cuts the outputs of a column-parallel module; None: unclear."""
        if widths is None:
            return
        maker, total = self._makers.get(_base(tensor), (None, sympy.S.Zero))
        size = _whole(self._symbols.expr(tensor.shape[dim]))
        start = sympy.S.Zero if size == total else self._start(tensor, dim)
        parts = [start, *widths, total - start - size]
        clear = all(part.is_Integer and part >= 0 for part in parts)
        new = tuple(int(part) for part in parts if part != 0) if clear else UNKNOWN
        if maker is not None:
            self._cuts[maker] = _refined(self._cuts.get(maker, new), new)
        # Experts cut what their own forward has made, which is no other module's.
        elif len(widths) > 1 and id(self.frames[-1].module) not in self._columns:
            self._copies_cut = True

    def _start(self, tensor: torch.Tensor, dim: int) -> Expr:
        """Where a part of a module's outputs begins; NaN where that is not known."""
        last = dim == tensor.dim() - 1 and tensor.stride(dim) == 1
        return _whole(self._symbols.expr(tensor.storage_offset())) if last else sympy.S.NaN

    @property
    def fused(self) -> dict[int, tuple[int, ...]]:
        """The widths of the matrices that a column-parallel module holds side by side.

        One if its outputs are not cut; `UNKNOWN` where cuts contradict each other. A copy that is
        cut may be of any matrix.
        """
        return {
            maker: UNKNOWN if self._copies_cut and len(widths) > 1 else widths
            for maker, widths in self._cuts.items()
        }

    def _wholes(
        self, operands: Mapping[int, torch.Tensor]
    ) -> Iterator[tuple[int, tuple[OperandPart, Size]]]:
        """Tensors that are whole where another one in the call is a share: their part, its size."""
        shapes = {i: self._symbols.shape(each) for i, each in operands.items()}
        shares = {
            (dim - len(shape), _whole(size)): operands[i].shape[dim]
            for i, shape in shapes.items()
            for dim, size in enumerate(shape)
            if size.has(T)
        }
        for i, shape in shapes.items() if shares else ():
            for dim, size in enumerate(shape):
                if not size.has(T) and (dim - len(shape), size) in shares and size != 1:
                    share = shares[dim - len(shape), size]
                    block = int(size.as_coeff_Mul()[0]) if size.free_symbols else None
                    yield i, (OperandPart(dim=dim, block=block), share)

    def _unit_of(self, size: Size) -> _Unit | None:
        """The units that a size has a share of."""
        symbols = size.node.expr.free_symbols if isinstance(size, torch.SymInt) else ()
        return next((self._units[each] for each in symbols if each in self._units), None)

    def _local(self, size: Number, change: LocalNumber, unit: _Unit) -> Number:
        whole = size if change.whole is None else change.whole
        if not change.divided or whole is None:
            return whole
        return whole // int(unit[0]) * unit[1]


def _evenly(total: Expr, count: Expr) -> list[Expr] | None:
    """The widths of `count` matrices of one width; None where that is no number."""
    return [total / count] * int(count) if count.is_Integer else None


def _widths(call: SizedCall, sizes: Sequence[Expr | None], total: Expr) -> list[Expr]:
    """The widths of the matrices that a split, or one slice, takes apart."""
    if call.name == "__getitem__":
        start, stop = (sizes[0] or sympy.S.Zero), (total if sizes[1] is None else sizes[1])
        widths = [width for width in (start, stop - start, total - stop) if width != 0]
        return [sympy.S.NaN] if any(width.is_negative for width in widths) else widths
    known = [size for size in sizes if size is not None]
    return known if len(known) > 1 else _evenly(total, total / known[0]) or [sympy.S.NaN]


def _refined(known: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...]:
    """The widths between the bounds of both; `UNKNOWN` where one of them cuts and one does not."""
    if known == new or sum(known) != sum(new) or 1 in (len(known), len(new)):
        return known if known == new else UNKNOWN
    bounds = {0, *accumulate(known), *accumulate(new)}
    return tuple(b - a for a, b in pairwise(sorted(bounds)))


def _before(group: _Group, taken: int, outputs: Sequence[Expr]) -> Expr:
    """How often a view repeats dimension `taken` within its group; NaN where it splits nothing."""
    if len(group.outputs) == 1:
        return sympy.S.NaN
    return prod((outputs[j] for j in group.outputs if j < taken), start=sympy.S.One)


def _shares_of(sizes: Sequence[Expr | None], unit: Expr) -> dict[int, LocalNumber]:
    """Sizes of the whole, if all are whole units: a rank has a share of each."""
    whole = [(i, n) for i, n in enumerate(sizes) if n is not None and not n.has(T) and n != 0]
    if any(not _fits(n, unit) or n.is_negative for _, n in whole):
        return {}
    return {i: LocalNumber(whole=None, divided=True) for i, _ in whole}


def _base(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor._base is None else tensor._base


def _whole(size: Expr) -> Expr:
    return size.subs(T, 1)


def _open(size: Number) -> bool:
    return isinstance(size, int) and size == -1


def _fits(size: Expr, unit: Expr) -> bool:
    """Whether a size is a number of whole units, for any b and s."""
    return all(c.is_Integer for c in sympy.expand(size / unit).as_coefficients_dict().values())


def _groups(inputs: Sequence[Expr], outputs: Sequence[Expr]) -> Iterator[_Group]:
    """The smallest runs of dimensions with equal products, from the left."""
    sizes = [[int(size.subs(LARGE)) for size in each] for each in (inputs, outputs)]
    places, products = [0, 0], [1, 1]
    starts = [0, 0]
    while places[0] < len(sizes[0]) or places[1] < len(sizes[1]):
        # The side with the smaller product takes its next dimension; ones join what is open.
        side = 0 if products[0] <= products[1] and places[0] < len(sizes[0]) else 1
        side = side if places[side] < len(sizes[side]) else 1 - side
        products[side] *= sizes[side][places[side]]
        places[side] += 1
        if products[0] == products[1] and all(p > s for p, s in zip(places, starts, strict=True)):
            yield _Group(
                inputs=list(range(starts[0], places[0])), outputs=list(range(starts[1], places[1]))
            )
            starts, products = list(places), [1, 1]
