"""The sequence lengths of a trace in few words, and expressions that use them.

A traced run takes one way at each branch, and so holds for the lengths that take the same ways: a
regime. Shapes that are halved again and again leave dozens of guards (2 floor(s/2) = s,
Max(1, floor(s/4)) > 1, ...), a window or a mask one or two (s > 512). The guards in s alone are
evaluated at every s up to a horizon. From the traced length on, both ways, the largest set is taken
of which a person can see what is in it, the multiples of m in an interval, and in which all guards
hold. Its relations take the place of the guards; s = m k for a positive integer k makes the
expressions plain. Guards in b and s that hold at all these lengths for every batch are left out.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import reduce
from typing import Final, TypeVar, cast

import numpy as np
import sympy
from numpy.typing import NDArray
from sympy import Basic, Expr

from mist.model.graph import B, Block, ModelGraph, S
from mist.model.summary import Lengths

HORIZON: Final = 8192  # at least; no guard that torch writes has a longer period
FARTHEST: Final = 2**18  # a number in a guard beyond it is no threshold of a sequence
# The batches at which guards in b and s are evaluated; a fixed one, or a threshold, is among them.
BATCHES: Final = np.array([*range(2, 257), 1024, 4096])
_K: Final = sympy.Symbol("k", positive=True, integer=True)

V = TypeVar("V")


def simplify_graph(graph: ModelGraph, seq_len: int) -> ModelGraph:
    """The same costs on the regime of `seq_len` [tokens], in plainer expressions."""
    blocks = (graph.embed, *graph.blocks, graph.head)
    guards = sorted({relation for block in blocks for relation in block.domain}, key=str)
    of_length = [guard for guard in guards if guard.free_symbols == {S}]
    if not of_length:
        return graph
    lengths = _regime(of_length, seq_len)
    inside = _inside(lengths, _horizon(guards, seq_len))
    others = [g for g in guards if g not in of_length and not _always(g, inside)]
    domain = tuple(sorted({*others, *_relations(lengths)}, key=str))
    plain = _Plain(lengths.multiple)

    def simple(block: Block) -> Block:
        return replace(plain.mapped(block), domain=domain)

    return replace(
        graph,
        embed=simple(graph.embed),
        blocks=tuple(map(simple, graph.blocks)),
        head=simple(graph.head),
        shared=plain.mapped(graph.shared),
        shared_single=plain.mapped(graph.shared_single),
        lengths=lengths,
    )


def _inside(lengths: Lengths, horizon: int) -> NDArray[np.int64]:
    """The lengths of a regime up to a horizon."""
    last = horizon if lengths.last is None else min(lengths.last, horizon)
    return np.arange(lengths.first, last + 1, lengths.multiple)


def _always(guard: Basic, lengths: NDArray[np.int64]) -> bool:
    """Whether a guard holds at these lengths for every batch, as sizes of tensors do."""
    if not guard.free_symbols <= {B, S}:
        return False
    with np.errstate(invalid="ignore", divide="ignore"):  # guards need not have a value everywhere
        return bool(np.all(sympy.lambdify((B, S), guard, "numpy")(BATCHES[:, None], lengths)))


def _relations(lengths: Lengths) -> Iterator[Basic]:
    """What says in s that a length is one of these."""
    if lengths.first == lengths.last:
        yield sympy.Eq(S, lengths.first)
        return
    if lengths.first > lengths.multiple:
        yield S >= lengths.first
    if lengths.last is not None:
        yield S <= lengths.last
    if lengths.multiple > 1:
        yield sympy.Eq(sympy.Mod(S, lengths.multiple), 0)


def _regime(guards: Sequence[Basic], seq_len: int) -> Lengths:
    """The lengths around `seq_len` at which all guards hold together."""
    longest = [int(guard.rhs) for guard in guards if _is_longest(guard)]
    winding = [guard for guard in guards if not _is_longest(guard)]
    valid = _holding(winding, _horizon(winding, seq_len))
    step = next((m for m in _divisors(seq_len) if _neighbours(valid, seq_len, m)), None)
    if step is None:
        return Lengths(first=seq_len, last=seq_len)
    gaps = (np.flatnonzero(~valid[step - 1 :: step]) + 1) * step
    below, above = gaps[gaps < seq_len], gaps[gaps > seq_len]
    return Lengths(
        first=int(below[-1]) + step if len(below) else step,
        last=min((*longest, *(int(gap) - step for gap in above[:1])), default=None),
        multiple=step,
    )


def _is_longest(guard: Basic) -> bool:
    """Whether a guard says only that s is at most some number."""
    return isinstance(guard, sympy.Le) and guard.lhs == S and guard.rhs.is_Integer


def _horizon(guards: Iterable[Basic], seq_len: int) -> int:
    """Up to where guards are evaluated: beyond what they compare with."""
    numbers = {int(n) for guard in guards for n in guard.atoms(sympy.Integer)}
    return max(HORIZON, 4 * seq_len, *(2 * n for n in numbers if n <= FARTHEST))


def _holding(guards: Iterable[Basic], horizon: int) -> NDArray[np.bool_]:
    """Of each length from 1 to the horizon, whether all guards hold."""
    lengths = np.arange(1, horizon + 1)
    with np.errstate(invalid="ignore", divide="ignore"):  # guards need not have a value everywhere
        masks = [
            np.broadcast_to(sympy.lambdify(S, guard, "numpy")(lengths), lengths.shape)
            for guard in guards
        ]
    return reduce(np.logical_and, masks, np.ones(horizon, dtype=bool))


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _neighbours(valid: NDArray[np.bool_], seq_len: int, step: int) -> bool:
    """Whether a length one step from this is valid, too."""
    around = (each for each in (seq_len - step, seq_len + step) if each > 0)
    return any(bool(valid[each - 1]) for each in around)


class _Plain:
    """Expressions where s is a multiple of `multiple`."""

    def __init__(self, multiple: int) -> None:
        self._multiple = multiple
        self._known: dict[Expr, Expr] = {}

    def mapped(self, value: V) -> V:
        """The same record with plain expressions; what is not an expression stays."""
        result: object = value
        if isinstance(value, Expr):
            result = self._expr(value)
        elif isinstance(value, tuple):
            result = tuple(map(self.mapped, value))
        elif is_dataclass(value) and not isinstance(value, type):
            names = (item.name for item in fields(value))
            result = replace(value, **{name: self.mapped(getattr(value, name)) for name in names})
        return cast(V, result)

    def _expr(self, expr: Expr) -> Expr:
        if expr not in self._known:
            divided = expr.subs(S, self._multiple * _K)
            self._known[expr] = sympy.expand(divided.subs(_K, S / self._multiple))
        return self._known[expr]
