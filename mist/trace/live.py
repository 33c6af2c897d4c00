"""Which storages are alive at each instant of a backward pass, and the worst instants.

live(i) = bytes of the storages alive after operation i: those saved by the forward pass and not
yet released, and those made since. Gradients of parameters (states, not activations) count or not.
transient(i) = live(i) - all saved bytes. Only instants that are the worst somewhere on a grid of
(b, s, t) are kept: their maximum is the peak.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Final

import numpy as np
import sympy
import torch
from numpy.typing import NDArray
from sympy import Expr
from torch.multiprocessing.reductions import StorageWeakRef

from mist.graph import B, S, T
from mist.trace.expr import Symbols

# Powers of two over the range that plans use; between them no other term takes the lead for long.
GRID: Final = np.array(
    np.meshgrid(2 ** np.arange(7.0), 2 ** np.arange(4, 21.0), 2 ** np.arange(7.0))
).reshape(3, -1)


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
        moments = np.array(sorted(rows), dtype=float).reshape(len(rows), len(sizes))
        worst = _maximal(moments, sizes)
        return tuple(
            sympy.expand(sum(int(n) * size for n, size in zip(row, sizes, strict=True)))
            for row in worst
        )

    def _row(self, alive: Iterable[int], rank: dict[Expr, int]) -> tuple[int, ...]:
        """How many storages of each size are alive, less those that were saved."""
        count = Counter(rank[self._bytes[i]] for i in alive)
        count.subtract(rank[size] for size in self._bytes[: self._num_saved])
        return tuple(count[i] for i in range(len(rank)))


def _maximal(moments: NDArray[np.float64], sizes: list[Expr]) -> NDArray[np.float64]:
    """The rows whose weighted sum is the largest at some point of the grid."""
    if not len(moments):
        return moments
    values = [np.broadcast_to(_evaluate(size), GRID.shape[1:]) for size in sizes]
    totals = moments @ np.array(values).reshape(len(sizes), GRID.shape[1])
    worst = np.unique(totals.argmax(axis=0))
    return np.asarray(moments[worst])


def _evaluate(size: Expr) -> NDArray[np.float64]:
    return np.asarray(sympy.lambdify((B, S, T), size, "numpy")(*GRID), dtype=np.float64)
