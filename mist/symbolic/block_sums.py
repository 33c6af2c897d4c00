"""Sums and maxima over the blocks of a stage: a row for each block at each memory level."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import sympy
from sympy import Expr

from mist.plans.memory_levels import KEEPS_ALL
from mist.plans.workload import MemoryLevel
from mist.symbolic import symbols as sym

Row = tuple[str, str, Expr]  # block, level, how many of it the stage has


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBlocks:
    """The rows of a stage: `layers` of each kind at each level, and the two `ends` of the model.

    `forward`: of these the rows that may hold more in the forward pass than in the backward pass.
    `behind`: for each kind of layer the kinds of which all layers come after all of its own, as
    those of a decoder behind an encoder's.
    """

    layers: tuple[Row, ...]
    ends: tuple[Row, ...]
    forward: tuple[Row, ...]
    behind: Mapping[str, frozenset[str]]

    @property
    def every(self) -> tuple[Row, ...]:
        """Layers and ends."""
        return (*self.layers, *self.ends)


def stage_blocks(
    kinds: Sequence[int], levels: Sequence[MemoryLevel], terms: Container[str]
) -> StageBlocks:
    """The rows of any stage of a model, each kind of layer at each of these levels.

    `kinds`: of each layer, in order. `terms`: by name; rows of `forward` are those that have one.
    """
    layers = tuple(
        (str(kind), level.column, sym.layer_count(level.column, kind))
        for kind in sorted(set(kinds))
        for level in levels
    )
    ends = (("embed", KEEPS_ALL.value, sym.FIRST), ("head", KEEPS_ALL.value, sym.LAST))
    more = (row for row in (*layers, *ends) if f"{row[0]}_{row[1]}_forward_bytes" in terms)
    first = {str(kind): kinds.index(kind) for kind in kinds}
    last = {str(kind): number for number, kind in enumerate(kinds)}
    behind = {
        kind: frozenset(other for other in first if first[other] > last[kind]) for kind in first
    }
    return StageBlocks(layers=layers, ends=ends, forward=tuple(more), behind=behind)


def term(name: str) -> sympy.Symbol:
    """The symbol by which a stage formula names a term."""
    return sympy.Symbol(f"term_{name}", real=True)


def sum_over(rows: Iterable[Row], template: str) -> Expr:
    """The sum of a term over the blocks of a stage; `template` names it: "{x}_{level}_kept_bytes".

    Terms that do not depend on the memory level are named without it: "{x}_params".
    """
    return sympy.Add(*(count * each for each, count in _counts(rows, template).items()))


def _counts(rows: Iterable[Row], template: str) -> dict[sympy.Symbol, Expr]:
    """How many blocks have each term. Programs multiply once for all levels with the same one."""
    counts: dict[sympy.Symbol, Expr] = {}
    for x, level, count in rows:
        each = term(template.format(x=x, level=level))
        counts[each] = counts.get(each, sympy.Integer(0)) + count
    return counts


def max_over(rows: Sequence[Row], template: str, less: Sequence[Expr] = ()) -> Expr:
    """The largest of a term over the blocks that the stage has at all; see `sum_over`.

    `less`: what is taken off the term of each row, if anything.
    """
    if not less:  # no term is negative: what some level has is the largest of all levels with it
        counts = _counts(rows, template)
        return sym.larger(*(sym.smaller(1, count) * each for each, count in counts.items()))
    return sym.larger(
        *(
            sym.smaller(1, count) * (term(template.format(x=x, level=level)) - off)
            for (x, level, count), off in zip(rows, less, strict=True)
        )
    )


def least_of(rows: Sequence[Row], template: str) -> Expr:
    """The smallest of a term over the blocks that the stage has at all; see `sum_over`."""
    counts = _counts(rows, template)
    most = sym.larger(*counts)
    return sym.smaller(*(most - sym.smaller(1, n) * (most - each) for each, n in counts.items()))


def params_of(rows: Iterable[Row], which: str = "params") -> Expr:
    """Parameters of the stage on a rank, or `which`; a tied one that both ends have counts once."""
    return sum_over(rows, "{x}_" + which) - sym.FIRST * sym.LAST * term(f"tied_{which}")
