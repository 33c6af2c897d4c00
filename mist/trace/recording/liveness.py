"""Which storages are alive at each instant of a backward pass, and the worst instants.

live(i) = bytes of the storages alive after operation i: those saved by the forward pass and not
yet released, and those made since. Gradients of parameters (states, not activations) count or not.
Under sequence parallelism a rank has 1/q of an activation that no matrix divides: it gathers the
whole for the calls of an autograd node that reads divided tensors, too; what such a call makes is a
whole that adds to those of other ranks, until a call other than an addition needs it and scatters.
transient(i) = live(i) - all saved bytes. An instant is dropped if another one is at least as
large in every monomial of (b, s, t, q): the maximum of the others is the peak at every size.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from enum import Enum

import numpy as np
import sympy
import torch
from numpy.typing import NDArray
from sympy import Expr
from torch.multiprocessing.reductions import StorageWeakRef

from mist.model.graph import GATHER_COPY, GATHERS, SCATTER_COPY, Q, T, TensorLayout
from mist.trace.expressions import Symbols


class Form(Enum):
    """The part of an activation on a rank under sequence parallelism, and copies in addition."""

    SHARE = 1 / Q
    WHOLE = sympy.Integer(1)
    GATHERED = GATHERS
    GATHER_COPY = GATHER_COPY
    SCATTERED = GATHERS / Q
    SCATTER_COPY = SCATTER_COPY


class Counted(Enum):
    """Which gradients of parameters count: none, those of the node that runs, all so far."""

    NONE = 0
    MADE_NOW = 1
    SO_FAR = 2


Entry = tuple[int, Form]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardCall:
    """A call of the backward pass: the storages (keys) that it reads, and the node it belongs to.

    `divided`: it reads or makes a tensor that tensor parallelism divides, or needs all tokens.
    `adds`: all it does is to add. `entrance`: where what it answers to entered what is divided.
    """

    inputs: tuple[int, ...]
    node: int | None
    divided: bool
    adds: bool
    entrance: int | None


class Live:
    """The storages of one part of a model, by weak reference."""

    def __init__(self, symbols: Symbols) -> None:
        self._symbols = symbols
        # Weak, as a strong reference would keep alive what is to be seen freed.
        self._refs: list[StorageWeakRef] = []
        self._bytes: list[Expr] = []
        self._last: dict[int, int] = {}
        self._saved: dict[int, None] = {}
        self._num_forward = 0
        self._moments: dict[tuple[Entry, ...], int | None] = {}
        self._forward: dict[tuple[int, ...], None] = {}
        self._passed: frozenset[int] = frozenset()
        self._partial: set[int] = set()
        self._held: set[int] = set()
        self._gradients: frozenset[int] = frozenset()
        self._whole: set[int] = set()
        # Of gradients: the entrances of which a part of a sum over the ranks was added to them.
        self._summed: dict[int, frozenset[int | None]] = {}
        self._gathered: list[int] = []
        self._node: int | None = None

    def save(self, tensor: torch.Tensor) -> None:
        """Watch a storage that the forward pass keeps for the backward pass."""
        self.hold(tensor)
        self._saved[self._last[tensor.untyped_storage()._cdata]] = None

    def release(self, key: int) -> None:
        """A storage that was saved is held by others, too: it counts where it is alive."""
        del self._saved[self._last[key]]

    def hold(self, tensor: torch.Tensor) -> None:
        """Start to watch the storage of a tensor, unless it is watched already."""
        storage = tensor.untyped_storage()
        known = self._last.get(storage._cdata)
        # A new storage may have the address of one that was freed.
        if known is None or self._refs[known].expired():
            self._last[storage._cdata] = len(self._refs)
            self._refs.append(StorageWeakRef(storage))
            self._bytes.append(self._symbols.expr(storage.nbytes()))

    def forward_done(self, gathered: Iterable[int], inputs: Iterable[torch.Tensor] = ()) -> None:
        """What is watched from here on is of the backward pass; some saved is `gathered`.

        `inputs`: those that only who called the part holds, through all of its forward pass.
        """
        self._whole.update(self._last[key] for key in gathered if key in self._last)
        for tensor in inputs:
            self.hold(tensor)
            self._around(tensor)
        self._num_forward = len(self._refs)
        if self._forward:
            # What the forward pass made and others hold is not of the backward pass.
            self._passed = frozenset(range(self._num_forward)).difference(self._saved)
            self._last = {key: i for key, i in self._last.items() if i not in self._passed}

    def _around(self, tensor: torch.Tensor) -> None:
        index = self._last[tensor.untyped_storage()._cdata]
        if index not in self._saved:
            self._held.add(index)
            if not tensor.requires_grad:  # a mask, of all tokens on every rank
                self._partial.add(index)

    def called_forward(self, results: Iterable[torch.Tensor], *, divided: bool) -> None:
        """A call of a forward pass that goes back later has run; see `called`.

        `divided`: it reads a tensor that tensor parallelism divides. Its result, where it is not
        divided, is a sum over the ranks: whole, unless it is saved as a rank's share.
        """
        num_known = len(self._refs)
        for tensor in results:
            self.hold(tensor)
        if divided:
            self._partial.update(range(num_known, len(self._refs)))
        self._forward[tuple(self._alive())] = None

    def called(self, step: BackwardCall, results: Iterable[torch.Tensor]) -> TensorLayout:
        """A call of a pass has run; `results`: those that are to be watched.

        Returns the part of what it works on that a rank has, where no matrix divides it.
        """
        before, num_known = self._alive(), len(self._refs)
        activations = self._flowing(step.inputs, before)
        for tensor in results:
            self.hold(tensor)
        new = range(num_known, len(self._refs))
        if step.node != self._node:
            self._node, self._gathered = step.node, []
        layout = self._layout(step, activations)
        self._sum_up(step, activations, new)
        if step.divided:
            self._gather(activations - self._whole, before)
        elif new and not (layout == TensorLayout.PARTIAL and activations <= self._whole):
            self._scatter(activations & self._whole, before)
        if step.divided or activations & self._whole:
            self._whole.update(new)
        self._note(self._alive())
        return layout

    def _layout(self, step: BackwardCall, activations: set[int]) -> TensorLayout:
        """The part of what a call works on that a rank has, where no matrix divides it.

        What entered once has one sum over the ranks, taken once: its parts are added before, each
        of them whole. Autograd may add the first of them to something else, which a rank does last.
        """
        entrances = Counter(e for index in activations for e in self._sums_in(index))
        if step.adds and any(count > 1 for count in entrances.values()):
            return TensorLayout.PARTIAL
        reads_gathered = not activations.isdisjoint(self._gathered)
        return TensorLayout.GATHERED if reads_gathered else TensorLayout.REPLICATED

    def _sum_up(self, step: BackwardCall, activations: set[int], new: Sequence[int]) -> None:
        """Note of which sums a part is in what a call makes."""
        if step.adds:
            summed = frozenset[int | None]().union(*map(self._sums_in, activations))
            # In place nothing is new.
            self._summed.update(dict.fromkeys(new or activations, summed))
        elif step.divided:
            self._summed.update(dict.fromkeys(new, frozenset({step.entrance})))

    def _sums_in(self, index: int) -> frozenset[int | None]:
        return self._summed.get(index, frozenset())

    def _flowing(self, keys: Iterable[int], alive: Sequence[int]) -> set[int]:
        """Which of these the backward pass made, as activations that no matrix divides."""
        indices = {self._last.get(key, -1) for key in keys}.intersection(alive)
        from_backward = [index for index in indices if index >= self._num_forward]
        return {index for index in from_backward if _is_replicated(self._bytes[index])}

    def _gather(self, indices: Iterable[int], before: Sequence[int]) -> None:
        """A call on divided tensors reads the whole of these, of which a rank has a share."""
        for index in sorted(set(indices).difference(self._gathered)):
            self._gathered.append(index)
            self._note(before, (index, Form.GATHER_COPY))

    def _scatter(self, indices: Iterable[int], before: Sequence[int]) -> None:
        """These are summed over the ranks, and each keeps its share."""
        for index in sorted(indices):
            self._note(before, (index, Form.SCATTER_COPY), (index, Form.SCATTERED))
            self._whole.discard(index)

    def _alive(self) -> list[int]:
        indices = range(len(self._refs))
        return [i for i in indices if i not in self._passed and not self._refs[i].expired()]

    def _note(self, alive: Sequence[int], *more: Entry) -> None:
        """Note a moment: which storages are alive, what a rank has of each, and `more`."""
        gathered = [(index, Form.GATHERED) for index in self._gathered if index in alive]
        # Many calls leave the same storages alive: such moments are one.
        self._moments.setdefault((*map(self._entry, alive), *gathered, *more), self._node)

    def _entry(self, index: int) -> Entry:
        return index, Form.WHOLE if index in self._whole else Form.SHARE

    def backward_done(self, gradients: Iterable[torch.Tensor]) -> None:
        """These tensors, where they are watched, are gradients of parameters."""
        indices = (self._last.get(each.untyped_storage()._cdata) for each in gradients)
        self._gradients = frozenset(index for index in indices if index is not None)

    @property
    def history(
        self,
    ) -> tuple[tuple[Expr, ...], tuple[tuple[Entry, ...], ...], tuple[int, ...], tuple[int, ...]]:
        """Bytes of the storages; which are alive at each moment; which are saved; gradients."""
        moments, gradients = tuple(self._moments), tuple(sorted(self._gradients))
        return tuple(self._bytes), moments, tuple(self._saved), gradients

    def resized(self, sizes: Iterable[Expr]) -> "Live":
        """The same history of storages of other sizes."""
        other = copy(self)
        other._bytes = list(sizes)
        return other

    def transients(self, counted: Counted = Counted.NONE) -> tuple[Expr, ...]:
        """Bytes beyond the saved ones at the worst instants, with these gradients of parameters."""
        saved = [self._entry(index) for index in self._saved]
        every = dict.fromkeys([*saved, *(entry for moment in self._moments for entry in moment)])
        size_of = {entry: self._on_a_rank(*entry) for entry in every}
        # Storages of equal size are interchangeable: a moment becomes a row of counts by size, and
        # thousands of moments become few rows.
        sizes = sorted(set(size_of.values()), key=str)
        rank_of = {entry: sizes.index(size) for entry, size in size_of.items()}
        rows = {
            _counts([rank_of[entry] for entry in moment if entry[0] not in out],
                    [rank_of[entry] for entry in saved], len(sizes))
            for moment, out in zip(self._moments, self._left_out(counted), strict=True)
        }  # fmt: skip
        moments = np.array(sorted(rows)).reshape(len(rows), len(sizes))
        return tuple(
            sympy.expand(sum(int(n) * size for n, size in zip(row, sizes, strict=True)))
            for row in moments[_undominated(moments @ _coefficients(sizes))]
        )

    def _left_out(self, counted: Counted) -> Iterator[frozenset[int]]:
        """Of each moment the gradients of parameters that do not count."""
        made_by: dict[int, int | None] = {}
        for moment, node in self._moments.items():
            for index in self._gradients.intersection(index for index, _ in moment):
                made_by.setdefault(index, node)
            yield {
                Counted.NONE: self._gradients,
                Counted.MADE_NOW: frozenset(i for i, maker in made_by.items() if maker != node),
                Counted.SO_FAR: frozenset(),
            }[counted]

    def forward_transients(self) -> tuple[Expr, ...]:
        """Bytes beyond the saved ones at the worst instants of the forward pass."""
        whole = self._whole | self._partial.difference(self._saved)

        def entry(index: int) -> Entry:
            return index, Form.WHOLE if index in whole else Form.SHARE

        moments = (self._held.union(alive) for alive in self._forward)
        forward_only = copy(self)
        forward_only._moments = {tuple(map(entry, sorted(each))): None for each in moments}
        return forward_only.transients()

    def made_bytes(self) -> tuple[Expr, ...]:
        """Bytes of what the backward pass made, at its worst instants, without gradients."""
        moments = {
            tuple(entry for entry in moment if entry[0] >= self._num_forward): node
            for moment, node in self._moments.items()
        }
        backward_only = copy(self)
        backward_only._moments, backward_only._saved = moments, {}
        return backward_only.transients()

    def most(self) -> tuple[Expr, ...]:
        """Bytes at the worst instants of the backward pass, saved ones included."""
        whole = copy(self)
        whole._saved = {}
        return whole.transients()

    def _on_a_rank(self, index: int, form: Form) -> Expr:
        """Bytes of a storage under tensor and sequence parallelism."""
        size = self._bytes[index]
        return size * form.value if _is_replicated(size) else size


def _is_replicated(size: Expr) -> bool:
    """Whether this is of samples or tokens, and of no tensor that tensor parallelism divides."""
    return bool(size.free_symbols) and T not in size.free_symbols


def _counts(alive: Iterable[int], saved: Iterable[int], num_sizes: int) -> tuple[int, ...]:
    """How many storages of each size are alive, less those that were saved."""
    count = Counter(alive)
    count.subtract(saved)
    return tuple(count[i] for i in range(num_sizes))


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
    # [i, j]: row j is at least row i in every column.
    least = (rows[first][:, None] <= rows[first]).all(axis=2).sum(axis=1)  # by itself, too
    return sorted(int(index) for index in first[least == 1])
