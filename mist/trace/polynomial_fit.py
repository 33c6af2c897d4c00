"""Costs of a model whose symbolic run fails, from runs at concrete sizes: exact or not at all.

Padding to a multiple and the like cannot run with symbolic sizes. Then every number of the record
(sizes, FLOPs, bytes) is taken as a polynomial

    sum of c_ij b^i s^j,   i = 0..2 (0 for b = 1),   j = 0..2

(a loss that compares all samples of a batch with each other has b^2)

whose coefficients solve the runs at as many points exactly, in rationals; at the other points the
polynomials must give the numbers of the run to the unit. s runs over a lattice of multiples of m.
The smallest m that holds is found last, and becomes the domain, Mod(s, m) = 0, with the largest
sizes that were run.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import product
from typing import Final, TypeVar, cast

import sympy
from sympy import Basic, Expr

from mist.model.graph import B, S
from mist.trace.recording.liveness import Counted
from mist.trace.recording.recorded_part import Entered, Part, SavedStorage
from mist.trace.recording.recorded_run import Piece, Point, RecordedRun

BATCHES: Final = (2, 3, 4)
MULTIPLES: Final = (2, 3, 4)
HELD_OUT: Final = ((5, 6), (6, 8), (64, 7))  # batch, multiple of the lattice; and:
LONGEST: Final = 8192  # tokens, at the first batch
LARGEST_UNIT: Final = 128
OTHER_OPS: Final = "runs do not have the same operations"
LATTICES: Final = (1, 2, 4, 8, 16, 32, 64)


V = TypeVar("V")


class NotPolynomial(Exception):
    """Why runs at concrete sizes give no expressions."""


class Fit:
    """Polynomials through values at points (b, s); the first points determine them."""

    def __init__(
        self, points: Sequence[tuple[int, int]], *, batch_powers: int, seq_powers: int = 3
    ) -> None:
        self.points = points
        powers = product(range(batch_powers), range(seq_powers))
        self._monomials = [B**i * S**j for i, j in powers]
        rows = [self._at(self._monomials, point) for point in points[: len(self._monomials)]]
        # One exact inverse serves every number of the record.
        self._solve = sympy.Matrix(rows).inv()
        self._known: dict[tuple[Expr, ...], Expr] = {}

    @staticmethod
    def _at(exprs: Sequence[Expr], point: tuple[int, int]) -> list[Expr]:
        return [expr.subs({B: point[0], S: point[1]}) for expr in exprs]

    def through(self, values: Sequence[Expr]) -> Expr:
        """The polynomial. Raises NotPolynomial when a held-out value is off it."""
        key = tuple(values)
        # Most numbers are the same in all runs.
        if len(set(key)) == 1:
            return key[0]
        if key not in self._known:
            count = len(self._monomials)
            weights = self._solve * sympy.Matrix(values[:count])
            expr = sympy.Add(*(w * m for w, m in zip(weights, self._monomials, strict=True)))
            for point, value in zip(self.points[count:], values[count:], strict=True):
                if self._at([expr], point) != [value]:
                    raise NotPolynomial(f"{value} at b = {point[0]}, s = {point[1]}")
            self._known[key] = expr
        return self._known[key]

    def merged(self, values: Sequence[V]) -> V:
        """Equal records with a polynomial in the place of each number that varies.

        Raises NotPolynomial where the records differ in anything else.
        """
        first: object = values[0]
        if isinstance(first, Expr):
            return cast(V, self.through(cast(Sequence[Expr], values)))
        if is_dataclass(first) and not isinstance(first, type):
            columns = {f.name: [getattr(value, f.name) for value in values] for f in fields(first)}
            return cast(V, replace(first, **{n: self.merged(c) for n, c in columns.items()}))
        if isinstance(first, tuple | list):
            rows = self._rows(cast(Sequence[Sequence[object]], values))
            return cast(V, type(first)(map(self.merged, rows)))
        if any(value != first for value in values):
            raise NotPolynomial(f"{first} in one run, {values[-1]} in another")
        return values[0]

    @staticmethod
    def _rows(values: Sequence[Sequence[object]]) -> Iterator[tuple[object, ...]]:
        if len({len(value) for value in values}) > 1:
            raise NotPolynomial(OTHER_OPS)
        return zip(*values, strict=True)


def fitted_run(
    run_at: Callable[[Point], RecordedRun],
    *,
    longest: int | None,
    batch: int | None,
    one_size: bool,
) -> RecordedRun:
    """A run with polynomials in b and s (batch None) or in s (a given batch).

    Args:
        run_at: records the model at a point of concrete sizes.
        longest: the longest sequence that the model takes, if there is a limit.
        batch: None, or the only batch size.
        one_size: whether all sequence lengths give the same run.

    Raises NotPolynomial when no lattice of sequence lengths gives exact polynomials.
    """
    unit = _unit(longest)
    longest = min(longest or LONGEST, LONGEST) // unit * unit
    points = [(b, k * unit) for b, k in (*product(BATCHES, MULTIPLES), *HELD_OUT)]
    points.append((BATCHES[0], longest))
    if batch is not None:
        points = sorted({(batch, s) for _, s in points})
    runs = _runs(run_at, points, batch=batch, one_size=one_size)
    merged = _merge(Fit(points, batch_powers=3 if batch is None else 1), runs)
    if one_size:  # holds at any length
        return replace(merged, domain=(B <= max(b for b, _ in points),))
    return _on_lattice(run_at, points, runs, unit=unit, batch=batch)


def _runs(
    run_at: Callable[[Point], RecordedRun],
    points: Sequence[tuple[int, int]],
    *,
    batch: int | None,
    one_size: bool,
) -> list[RecordedRun]:
    """The run at each of these points."""
    known: dict[tuple[int, int], RecordedRun] = {}
    runs: list[RecordedRun] = []
    for point in points:
        size = (point[0], 0) if one_size else point
        if size not in known:
            known[size] = run_at(_point(point, batch))
        runs.append(known[size])
        # Found out before the longest: a loop over chunks has more operations for more tokens.
        _refuse_other_ops(runs)
    return runs


def _on_lattice(
    run_at: Callable[[Point], RecordedRun],
    points: Sequence[tuple[int, int]],
    runs: Sequence[RecordedRun],
    *,
    unit: int,
    batch: int | None,
) -> RecordedRun:
    """The run with its polynomials on the finest lattice of sequence lengths on which they hold."""
    powers = 3 if batch is None else 1
    for lattice in (each for each in LATTICES if each < unit):
        # A multiple of this lattice and of no coarser one: if the polynomials hold there, too, the
        # lattice is as fine as this.
        odd = (batch or BATCHES[0], lattice * (unit // lattice + 1))
        try:
            run = run_at(_point(odd, batch))
            wider = Fit([*points, odd], batch_powers=powers)
            return _merge(wider, [*runs, run], lattice)
        except NotPolynomial:
            continue
    return _merge(Fit(points, batch_powers=powers), runs, unit)


def run_of_one_length(
    run_at: Callable[[Point], RecordedRun], *, seq_len: int, batch: int | None
) -> RecordedRun:
    """A run with polynomials in b alone (batch None), or of a given batch, at one length.

    Args:
        run_at: records the model at a point of concrete sizes.
        seq_len: the only sequence length [tokens].
        batch: None, or the only batch size.

    Raises NotPolynomial when a number of the record is no polynomial in b.
    """
    batches = (*BATCHES, *(held for held, _ in HELD_OUT)) if batch is None else (batch,)
    points = [(b, seq_len) for b in batches]
    fit = Fit(points, batch_powers=min(len(points), 3), seq_powers=1)
    run = _merge(fit, [run_at(_point(point, batch)) for point in points])
    bounds: tuple[Basic, ...] = (sympy.Le(B, max(batches)), sympy.Eq(S, seq_len))
    return replace(run, domain=bounds, fixed={S: sympy.Integer(seq_len)})


def _refuse_other_ops(runs: Sequence[RecordedRun]) -> None:
    """Raise NotPolynomial where the last of these runs has more or fewer operations."""
    first, last = runs[0].pieces, runs[-1].pieces
    if [len(piece.part.ops) for piece in first] != [len(piece.part.ops) for piece in last]:
        raise NotPolynomial(OTHER_OPS)


def _unit(longest: int | None) -> int:
    """The largest power of two of which the longest sequence holds every multiple used."""
    most = max(multiple for _, multiple in HELD_OUT)
    room = LARGEST_UNIT if longest is None else min(longest // most, LARGEST_UNIT)
    if room < 1:
        raise NotPolynomial(f"sequences of at most {longest} tokens are too short to fit")
    return 1 << (room.bit_length() - 1)


def _point(point: tuple[int, int], batch: int | None) -> Point:
    return Point(batch=point[0], seq=point[1], backward=batch is None)


def _merge(fit: Fit, runs: Sequence[RecordedRun], lattice: int = 1) -> RecordedRun:
    """One run from runs of the same operations."""
    first = runs[0]
    if len({(run.kinds, run.order, len(run.layers)) for run in runs}) > 1:
        raise NotPolynomial("layers differ from one size to another")
    pieces = [
        _piece(fit, row) for row in zip(*((r.embed, r.head, *r.layers) for r in runs), strict=True)
    ]
    return replace(
        first,
        embed=pieces[0],
        head=pieces[1],
        layers=tuple(pieces[2:]),
        shared=fit.merged([run.shared for run in runs]),
        domain=_domain(fit.points, lattice),
    )


def _domain(points: Sequence[tuple[int, int]], lattice: int) -> tuple[Basic, ...]:
    batch, seq = (max(sizes) for sizes in zip(*points, strict=True))
    bounds: tuple[Basic, ...] = (B <= batch, S <= seq)
    return bounds if lattice == 1 else (*bounds, sympy.Eq(sympy.Mod(S, lattice), 0))


def _piece(fit: Fit, pieces: Sequence[Piece]) -> Piece:
    first, lives = pieces[0], [piece.part.live for piece in pieces]
    live = lives[0].resized(fit.merged([each.history for each in lives])[0])
    part = replace(
        first.part,
        live=live,
        ops=fit.merged([piece.part.ops for piece in pieces]),
        storages=_storages(fit, [piece.part for piece in pieces]),
        entered=_entered(fit, [piece.part for piece in pieces]),
        awaited=replace(
            first.part.awaited,
            gradients=fit.merged([piece.part.awaited.gradients for piece in pieces]),
        ),
    )
    return Piece(
        part,
        boundary_bytes=fit.through([piece.boundary_bytes for piece in pieces]),
        carried_bytes=fit.through([piece.carried_bytes for piece in pieces]),
        transients=live.transients() if first.transients else (),
        transients_with_grads=live.transients(Counted.SO_FAR) if first.transients else (),
        transients_adding=live.transients(Counted.MADE_NOW) if first.transients else (),
        module=first.module,
    )


def _entered(fit: Fit, parts: Sequence[Part]) -> dict[int, list[Entered]]:
    columns = [[each.bytes for of in part.entered.values() for each in of] for part in parts]
    sizes = iter(fit.merged(columns))
    return {
        module: [replace(each, bytes=next(sizes)) for each in entries]
        for module, entries in parts[0].entered.items()
    }


def _storages(fit: Fit, parts: Sequence[Part]) -> dict[int, SavedStorage]:
    first = parts[0].storages
    columns = [list(part.storages.values()) for part in parts]
    sizes = fit.merged(
        [[(storage.bytes, storage.shape, storage.dtype) for storage in c] for c in columns]
    )
    return {
        key: replace(storage, bytes=size, shape=shape)
        for (key, storage), (size, shape, _) in zip(first.items(), sizes, strict=True)
    }
