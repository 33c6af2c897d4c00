"""Which instants of a forward pass may hold more than the backward pass of the same block does.

An instant is left out where at each t, without sequence parallelism (q = 1) and with it (q = t), an
instant of the backward pass holds at least as much at every size: their difference, in b' and s' of
b = 1 + b' and s = 1 + s', has no negative coefficient. Sizes are straight lines in 1/t: where one
instant covers another at both ends of a range of t, it does so within. Whole copies around the
collectives of sequence parallelism are of the backward pass alone.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Final

import numpy as np
import sympy
from numpy.typing import NDArray
from sympy import Expr

from mist.model.graph import GATHER_COPY, GATHERS, SCATTER_COPY, B, Q, S, T

# Ranges of t by their ends: few ranks one by one, then up to the largest group that is planned.
_RANGES: Final = (*((t,) for t in range(1, 9)), (8, 16), (16, 32), (32, 64))
_POINTS: Final = tuple(
    {T: t, Q: t if divides else 1, GATHERS: int(divides), GATHER_COPY: 0, SCATTER_COPY: 0}
    for ends in _RANGES
    for divides in (False, True)
    for t in ends
)
_CASES: Final = np.repeat(
    np.arange(2 * len(_RANGES)), [len(ends) for ends in _RANGES for _ in range(2)]
)
_SHIFTED: Final = {B: B + 1, S: S + 1}


def worst_forward(forward: Sequence[Expr], backward: Iterable[Expr]) -> tuple[Expr, ...]:
    """Those of the forward bytes that are above all of the backward bytes, and 0, somewhere."""
    table = _coefficients([*forward, *backward, sympy.S.Zero])
    mine, others = table[: len(forward), None], table[None, len(forward) :]
    at_points = np.all(others >= mine, axis=3)
    in_cases = np.logical_and.reduceat(at_points, np.unique(_CASES, return_index=True)[1], axis=2)
    covered = np.asarray(np.all(np.any(in_cases, axis=1), axis=1))
    return tuple(size for size, known in zip(forward, covered, strict=True) if not known)


def _coefficients(sizes: Iterable[Expr]) -> NDArray[np.float64]:
    """Of each size, at each point, the coefficient of each monomial in b' and s'."""
    rows = [_by_monomial(size) for size in sizes]
    monomials = list(dict.fromkeys(monomial for row in rows for monomial in row))
    none = np.zeros(len(_POINTS))
    table = [[row.get(monomial, none) for monomial in monomials] for row in rows]
    return np.moveaxis(np.reshape(table, (len(rows), len(monomials), len(_POINTS))), 1, 2)


def _by_monomial(size: Expr) -> dict[Expr, NDArray[np.float64]]:
    found: dict[Expr, NDArray[np.float64]] = {}
    for term in sympy.Add.make_args(sympy.expand(size.subs(_SHIFTED))):
        factor, monomial = term.as_independent(B, S, as_Add=False)
        number, share = factor.as_coeff_Mul()
        found[monomial] = found.get(monomial, 0) + float(number) * _at_points(share)
    return found


@cache
def _at_points(share: Expr) -> NDArray[np.float64]:
    return np.array([float(share.subs(point)) for point in _POINTS])
