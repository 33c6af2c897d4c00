"""Sums and maxima over the blocks of a stage: a row for each block at each memory level."""

from collections.abc import Iterable

import sympy
from sympy import Expr

from mist.plans.workload import MemoryLevel
from mist.platform.runtime import Runtime
from mist.symbolic import symbols as sym

Row = tuple[str, str, Expr]  # block, level, how many of it the stage has


def rows_of(num_kinds: int, runtime: Runtime) -> Iterable[Row]:
    """Every (block, level, how many of it the stage has)."""
    for kind in range(num_kinds):
        for level in MemoryLevel:
            if level is not MemoryLevel.SELECTIVE or runtime.selective is not None:
                yield str(kind), level.value, sym.layer_count(level.value, kind)
    yield "embed", "none", sym.FIRST
    yield "head", "none", sym.LAST


def term(name: str) -> sympy.Symbol:
    """The symbol by which a stage formula names a term."""
    return sympy.Symbol(f"term_{name}", real=True)


def of_blocks(rows: Iterable[Row], name: str) -> Expr:
    """Sum over the blocks of the stage of a term that does not depend on the memory level."""
    return sympy.Add(*(count * term(f"{x}_{name}") for x, _, count in rows))


def total(rows: Iterable[Row], name: str) -> Expr:
    """Sum over the blocks of the stage of a term of their memory level."""
    return sympy.Add(*(count * term(f"{x}_{level}_{name}") for x, level, count in rows))


def params_of(rows: list[Row], which: str = "params") -> Expr:
    """Parameters of the stage on a rank, or `which`; a tied one that both ends have counts once."""
    return of_blocks(rows, which) - sym.FIRST * sym.LAST * term(f"tied_{which}")


def worst(rows: Iterable[Row], template: str) -> Expr:
    """The largest of a term over the blocks that the stage has at all."""
    present = [
        sym.smaller(1, count) * term(template.format(x=x, level=level)) for x, level, count in rows
    ]
    return sym.larger(*present)
