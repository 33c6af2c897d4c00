"""Which matrices of a layer form a region, from what the input of each of them is made of.

A matrix is row-parallel if all that its input is made of are outputs of column-parallel ones; rows
that share a column are in one region. Some matrices of a region stay whole on every rank: *latent*
ones, which another column reads (the latent of keys and values, a part of which all heads share),
and the half of a product of low rank that is not next to the heads (adapters: W x + B A x has a
whole A in front of a divided B, and a whole B behind a divided A). They see all tokens and a part
of the gradients, so the region is entered, or ends, at the module around them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from mist.trace.tensor_parallel.tp_sharding import Matrix, Region


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A matrix and what its input is made of.

    `sources`: matrices whose outputs it is made of, by weight; `residual`: what the layer was
    given, too; `norms`: modules whose norms go over outputs of a source, where ranks can share the
    mean; `normed`: another norm does; `linear`: nothing but moves, casts, scaling and dropout lie
    between. Of the attention between, if any, `head_dim`; `heads_alike`: whether queries have the
    same; `pairs`: weights that give both keys and values.
    """

    matrix: Matrix
    sources: Mapping[int, Matrix]
    residual: bool
    norms: Sequence[nn.Module]
    normed: bool
    linear: bool
    head_dim: int | None
    heads_alike: bool
    pairs: frozenset[int]

    @property
    def divided(self) -> bool:
        """Whether its input may be divided."""
        return bool(self.sources) and not self.residual and not self.normed


@dataclass(slots=True)
class _RegionParts:
    """Matrices of one region, by weight."""

    columns: dict[int, Matrix] = field(default_factory=dict)
    rows: dict[int, Reader] = field(default_factory=dict)
    latent: set[int] = field(default_factory=set)


def regions_of(layer: nn.Module, readers: Sequence[Reader]) -> Iterator[Region]:
    """The regions of a layer, from the readers in the order of execution."""
    chains = _Chains(layer, readers)
    for group in chains.groups():
        if (region := chains.region(group)) is not None:
            yield region


class _Chains:
    """The matrices of a layer, and which of them are whole in a region."""

    def __init__(self, layer: nn.Module, readers: Sequence[Reader]) -> None:
        self._layer, self._readers = layer, readers
        # A weight that is read twice (tied) is known by what it reads first.
        self._known = {id(reader.matrix.weight): reader for reader in reversed(readers)}
        # Of low rank: the second matrix, and the first one.
        self._pairs = {
            key: next(iter(reader.sources))
            for key, reader in self._known.items()
            if self._is_low_rank(reader)
        }

    def groups(self) -> Iterator[_RegionParts]:
        """Rows with their columns; a matrix has one place in one group."""
        groups: list[_RegionParts] = []
        for reader in self._readers:
            key = id(reader.matrix.weight)
            if not reader.divided or key in self._pairs or self._is_normed_latent(reader):
                continue
            latent = self._latent(reader)
            columns = {k: m for k, m in reader.sources.items() if k not in latent}
            joined = [group for group in groups if group.columns.keys() & columns.keys()]
            used = {k for g in groups for k in (*g.columns, *g.rows, *g.latent)}
            shared = {k for group in joined for k in (*group.columns, *group.latent)}
            if {key, *columns, *latent} & (used - shared):
                continue
            new = _RegionParts(columns=columns, rows={key: reader}, latent=latent)
            for group in joined:
                new.columns |= group.columns
                new.rows = group.rows | new.rows
                new.latent |= group.latent
                groups.remove(group)
            groups.append(new)
        yield from groups

    def region(self, group: _RegionParts) -> Region | None:
        """The region of a group; None where no module lies around what is whole in it."""
        rows = [reader.matrix for reader in group.rows.values()]
        in_front = [self._around(*pair) for pair in self._whole_in_front(group)]
        behind = [
            self._around(second, group.rows[first].matrix)
            for second, first in self._low_rank_behind(group)
        ]
        around = {id(module): module for module in (*in_front, *behind)}
        if id(self._layer) in around:
            return None
        attending = next((r for r in group.rows.values() if r.head_dim), None)
        return Region(
            owners=list(self._owners([*rows, *group.columns.values()])),
            head_dim=attending.head_dim if attending else None,
            heads_alike=not group.latent and (attending is None or attending.heads_alike),
            pairs=attending.pairs if attending else frozenset(),
            colwise=list(group.columns.values()),
            rowwise=rows,
            entered=_outermost([*in_front, *(m.module for m in group.columns.values())]),
            ends=_outermost([*behind, *(m.module for m in rows)]),
            norms=[norm for reader in group.rows.values() for norm in reader.norms],
        )

    def _is_low_rank(self, reader: Reader) -> bool:
        first = next(iter(reader.sources.values()), None)
        if first is None or len(reader.sources) > 1 or reader.residual or not reader.linear:
            return False
        return first.num_out < min(first.num_in, reader.matrix.num_out)

    def _is_normed_latent(self, reader: Reader) -> bool:
        """Whether a normed latent enters this matrix.

        Others read it, too, or what is divided lies behind the matrix.
        """
        others = [other for other in self._readers if other is not reader]
        key, sources = id(reader.matrix.weight), reader.sources.keys()
        shared = any(sources & other.sources.keys() for other in others)
        behind = any(key in other.sources and other.divided for other in others)
        return bool(reader.norms) and (shared or behind)

    def _latent(self, reader: Reader) -> set[int]:
        """Sources that other sources read."""
        return {k for k in reader.sources for other in reader.sources if k in self._behind(other)}

    def _behind(self, key: int) -> set[int]:
        """All that a matrix reads, directly or not."""
        found: set[int] = set()
        waiting = [key]
        while waiting:
            reader = self._known.get(waiting.pop())
            new = reader.sources.keys() - found if reader is not None else set()
            found |= new
            waiting += new
        return found

    def _whole_in_front(self, group: _RegionParts) -> Iterator[tuple[Matrix, Matrix]]:
        """Whole matrices that a column reads, with it."""
        for key, column in group.columns.items():
            for source in self._behind(key):
                if source in group.latent or self._pairs.get(key) == source:
                    yield self._known[source].matrix, column

    def _low_rank_behind(self, group: _RegionParts) -> Iterator[tuple[Matrix, int]]:
        """Second matrices of low rank behind the rows, each with its row."""
        for second, first in self._pairs.items():
            if first in group.rows:
                yield self._known[second].matrix, first

    def _around(self, *matrices: Matrix) -> nn.Module:
        """The innermost module of the layer around matrices."""
        wanted = {id(matrix.module) for matrix in matrices}
        modules = self._layer.modules()
        return [m for m in modules if wanted <= {id(inner) for inner in m.modules()}][-1]

    def _owners(self, matrices: Sequence[Matrix]) -> Iterator[object]:
        """The modules around the matrices, within the layer, and their configuration."""
        inside = {id(matrix.module) for matrix in matrices}
        for module in self._layer.modules():
            if any(id(inner) in inside for inner in module.modules()):
                yield module
                if (config := getattr(module, "config", None)) is not None:
                    yield config


def _outermost(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Modules, once each, that lie in no other one of them."""
    every = dict.fromkeys(modules)
    inner = {id(i) for module in every for i in module.modules() if i is not module}
    return [module for module in every if id(module) not in inner]
