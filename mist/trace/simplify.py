"""The domain of a trace in few words, and expressions that use it.

Shapes that are halved again and again leave dozens of guards (2 floor(s/2) = s, Max(1, floor(s/4))
> 1, ...) that together say: s is a multiple of m, and at least s0. The guards in s alone that are
no upper bounds are evaluated at every s up to `LONGEST`; if they hold exactly at the multiples of
some m from some s0 on, these two relations take their place, and s = m k for a positive integer k
makes the expressions plain.
"""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from functools import reduce
from typing import Final, TypeVar, cast

import numpy as np
import sympy
from sympy import Basic, Expr

from mist.model.graph import ModelGraph, S

LONGEST: Final = 8192  # no guard that torch writes has a period or a threshold near it
_K: Final = sympy.Symbol("k", positive=True, integer=True)

V = TypeVar("V")


def simplify_graph(graph: ModelGraph) -> ModelGraph:
    """The same costs on the same domain, in plainer expressions."""
    blocks = (graph.embed, *graph.blocks, graph.head)
    guards = sorted({relation for block in blocks for relation in block.domain}, key=str)
    winding = [guard for guard in guards if guard.free_symbols == {S} and not _is_longest(guard)]
    lattice = _multiples(winding)
    if lattice is None:
        return graph
    start, multiple = lattice
    bounds: list[Basic] = [] if start <= multiple else [S >= start]
    others = [guard for guard in guards if guard not in winding]
    divides = [sympy.Eq(sympy.Mod(S, multiple), 0)] if multiple > 1 else []
    domain = tuple(sorted({*others, *bounds, *divides}, key=str))
    plain = _Plain(multiple)
    embed, *layers, head = (replace(plain.mapped(block), domain=domain) for block in blocks)
    return replace(
        graph,
        embed=embed,
        blocks=tuple(layers),
        head=head,
        shared=plain.mapped(graph.shared),
        shared_single=plain.mapped(graph.shared_single),
    )


def _is_longest(guard: Basic) -> bool:
    """Whether a guard says only that s is at most some number."""
    return isinstance(guard, sympy.Le | sympy.Lt) and guard.lhs == S and guard.rhs.is_Integer


def _multiples(guards: Sequence[Basic]) -> tuple[int, int] | None:
    """(s0, m) when all guards hold together exactly at the multiples of m that are at least s0."""
    if not guards:
        return None
    lengths = np.arange(1, LONGEST + 1)
    with np.errstate(invalid="ignore", divide="ignore"):  # guards need not have a value everywhere
        masks = [
            np.broadcast_to(sympy.lambdify(S, guard, "numpy")(lengths), lengths.shape)
            for guard in guards
        ]
    valid = lengths[reduce(np.logical_and, masks)]
    if len(valid) < 2:
        return None
    # The first two valid lengths suggest the rule; all others must confirm it.
    start, multiple = int(valid[0]), int(valid[1] - valid[0])
    expected = lengths[(lengths >= start) & (lengths % multiple == 0)]
    return (start, multiple) if np.array_equal(valid, expected) else None


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
