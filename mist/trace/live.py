"""Which storages are alive at each instant of a backward pass, and the worst instants.

live(i) = bytes of the storages alive after operation i: those saved by the forward pass and not
yet released, and those made since. Gradients of parameters (states, not activations) count or not.
transient(i) = live(i) - all saved bytes. An instant is left out where another one has no less of
any monomial in (b, s, t, q): the maximum of the others is the peak at every size.
"""

from collections import Counter
from collections.abc import Iterable

import numpy as np
import sympy
import torch
from numpy.typing import NDArray
from sympy import Expr
from torch.multiprocessing.reductions import StorageWeakRef

from mist.trace.expr import Symbols


class Live:
    """The storages of one part of a model, by weak reference."""

    def __init__(self, symbols: Symbols) -> None:
        self._symbols = symbols
        self._refs: list[StorageWeakRef] = []
        self._bytes: list[Expr] = []
        self._last: dict[int, int] = {}
        self._num_saved = 0
        self._moments: dict[tuple[int, ...], None] = {}
        self._gradients: frozenset[int] = frozenset()

    def hold(self, tensor: torch.Tensor) -> None:
        """Start to watch the storage of a tensor, unless it is watched already."""
        storage = tensor.untyped_storage()
        known = self._last.get(storage._cdata)
        if known is None or self._refs[known].expired():
            self._last[storage._cdata] = len(self._refs)
            self._refs.append(StorageWeakRef(storage))
            self._bytes.append(self._symbols.expr(storage.nbytes()))

    def forward_done(self) -> None:
        """Everything watched so far is what the forward pass saved."""
        self._num_saved = len(self._refs)

    def moment(self) -> None:
        """Note which storages are alive now."""
        alive = tuple(i for i, ref in enumerate(self._refs) if not ref.expired())
        self._moments[alive] = None

    def backward_done(self, gradients: Iterable[torch.Tensor]) -> None:
        """These tensors, where they are watched, are gradients of parameters."""
        found = (self._last.get(each.untyped_storage()._cdata) for each in gradients)
        self._gradients = frozenset(index for index in found if index is not None)

    @property
    def history(self) -> tuple[tuple[Expr, ...], tuple[tuple[int, ...], ...], int, tuple[int, ...]]:
        """Bytes of the storages; which are alive at each moment; how many are saved; gradients."""
        moments, gradients = tuple(self._moments), tuple(sorted(self._gradients))
        return tuple(self._bytes), moments, self._num_saved, gradients

    def resized(self, sizes: Iterable[Expr]) -> "Live":
        """The same history of storages of other sizes."""
        other = Live(self._symbols)
        other._bytes, other._moments = list(sizes), self._moments
        other._num_saved, other._gradients = self._num_saved, self._gradients
        return other

    def transients(self, *, with_grads: bool = False) -> tuple[Expr, ...]:
        """Bytes beyond the saved ones at the worst instants, with or without gradients so far."""
        sizes = sorted(set(self._bytes), key=str)
        rank = {size: i for i, size in enumerate(sizes)}
        out = frozenset() if with_grads else self._gradients
        rows = {self._row([i for i in alive if i not in out], rank) for alive in self._moments}
        moments = np.array(sorted(rows)).reshape(len(rows), len(sizes))
        return tuple(
            sympy.expand(sum(int(n) * size for n, size in zip(row, sizes, strict=True)))
            for row in moments[_undominated(moments @ _coefficients(sizes))]
        )

    def _row(self, alive: Iterable[int], rank: dict[Expr, int]) -> tuple[int, ...]:
        """How many storages of each size are alive, less those that were saved."""
        count = Counter(rank[self._bytes[i]] for i in alive)
        count.subtract(rank[size] for size in self._bytes[: self._num_saved])
        return tuple(count[i] for i in range(len(rank)))


def _coefficients(sizes: Iterable[Expr]) -> NDArray[np.float64]:
    """Of each size (row) the coefficient of each monomial (column); no monomial is negative."""
    terms = [sympy.expand(size).as_coefficients_dict() for size in sizes]
    monomials = list(dict.fromkeys(key for row in terms for key in row))
    table = [[float(row[key]) for key in monomials] for row in terms]
    return np.array(table).reshape(len(terms), len(monomials))


def _undominated(rows: NDArray[np.float64]) -> list[int]:
    """Which rows no other row equals or exceeds in every column; the first of equal ones."""
    if not rows.size:
        return []
    _, first = np.unique(rows, axis=0, return_index=True)
    least = (rows[first][:, None] <= rows[first]).all(axis=2).sum(axis=1)  # by itself, too
    return sorted(int(index) for index in first[least == 1])
