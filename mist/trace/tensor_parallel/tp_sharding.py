"""Tensor parallelism as symbolic shapes: which dimension of which parameter a rank holds 1/t of.

A *region* is a group of matrices that a rank holds 1/t of: column-parallel ones divide their
outputs (heads, MLP width), the row-parallel ones behind them their inputs, and one reduction
follows. The matrices of a region share a *unit*: the greatest number of equal shares that cuts no
head. A run gives the unit a symbol u meaning unit / t, so a local size is multiple * u. Embedding
and output head are divided by vocabulary. Regions come from the model's tp_plan (`tp_plan`) or from
its operations (`tp_graph`).
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd
from typing import Any, Final

import torch
from torch import nn

from mist.model.summary import TpLimit
from mist.trace.operations.sized_calls import SizeRule

# Attributes of an attention module that hold a number of heads or the width of all heads.
HEADS: Final = ("num_heads", "n_heads", "n_head", "num_attention_heads", "n_local_heads")
KV_HEADS: Final = ("num_kv_heads", "num_key_value_heads", "n_kv_heads", "n_local_kv_heads")
WIDTHS: Final = ("split_size", "all_head_size", "inner_dim")
HEAD_DIMS: Final = ("head_dim", "head_size", "attention_head_size")


WHOLE_VOCABULARY: Final = (
    "embedding and head stay whole on every tensor-parallel rank: the model's own loss, or a table "
    "that it adds, reads all logits"
)


class UnsupportedRules(Exception):
    """Why the model's tensor-parallel rules cannot be used; becomes a note."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A dimension of which a rank holds `multiple * unit / t`.

    `pieces`: matrices that lie side by side along it, of each of which a rank holds 1/t.
    """

    unit: int
    multiple: int
    dim: int = 0
    pieces: int = 1

    def widths_of(self, parameter: torch.Tensor) -> tuple[int, ...]:
        """The widths of these matrices in a parameter."""
        return (parameter.shape[self.dim] // self.pieces,) * self.pieces


Attribute = tuple[dict[str, Any], str, Share]


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A matrix (or one per expert): its parameters, its module, and which dimension is which.

    `pieces`: how many of the model's matrices it holds side by side, where its plan says so.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    module: nn.Module
    out_dim: int
    in_dim: int
    pieces: int = 1

    @property
    def num_out(self) -> int:
        """Outputs."""
        return self.weight.shape[self.out_dim]

    @property
    def num_in(self) -> int:
        """Inputs."""
        return self.weight.shape[self.in_dim]


@dataclass(slots=True, kw_only=True)
class Region:
    """Column-parallel matrices and the row-parallel ones behind them.

    `owners`: objects whose attributes may hold numbers of heads or widths that are smaller on a
    rank; `head_dim` is None for an MLP. `label`: what is divided when no heads are.
    """

    owners: Sequence[object]
    head_dim: int | None = None
    label: str = "MLP width"
    colwise: list[Matrix] = field(default_factory=list)
    rowwise: list[Matrix] = field(default_factory=list)

    def has_any(self, modules: frozenset[int]) -> bool:
        """Whether a matrix of it is in one of these modules."""
        return any(id(matrix.module) in modules for matrix in (*self.colwise, *self.rowwise))

    @property
    def grain(self) -> int:
        """What must not be cut: the size of a head where all matrices consist of heads."""
        sizes = [*(m.num_out for m in self.colwise), *(m.num_in for m in self.rowwise)]
        whole = self.head_dim and all(size % self.head_dim == 0 for size in sizes)
        return self.head_dim if whole and self.head_dim else 1

    @property
    def unit(self) -> int:
        """Into how many equal shares the region can be divided."""
        return gcd(*self.counts)

    @property
    def counts(self) -> set[int]:
        """Numbers of heads (or widths of an MLP) that every rank's share divides.

        A matrix with more outputs than there are queries has keys and values, too.
        """
        queries = self.width // self.grain
        outputs = {matrix.num_out // self.grain for matrix in self.colwise}
        inputs = {matrix.num_in // self.grain for matrix in self.rowwise}
        fused = {(n - queries) // 2 for n in outputs if n > queries} if self.grain > 1 else set()
        return outputs | inputs | fused

    @property
    def width(self) -> int:
        """Inputs of the row-parallel matrix: all heads, or the width of the MLP."""
        widths = [m.num_in for m in self.rowwise] or [m.num_out for m in self.colwise]
        return max(widths)

    def per_head(self) -> Iterator[nn.Parameter]:
        """Parameters of the module around the heads with one number for each (sinks)."""
        heads = self.width // self.grain
        for owner in self.owners if self.grain > 1 else ():
            for parameter in (
                owner.parameters(recurse=False) if isinstance(owner, nn.Module) else ()
            ):
                if parameter.shape == (heads,):
                    yield parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """The part of a model on a rank. Parameters and modules are meant by identity.

    `colwise`: modules whose input enters a region. `regions`: of each region the module that ends
    it in a reduction, with those that it is entered by. `whole`: modules that need all tokens also
    where they hold nothing divided (attention whose heads cannot be, routing). `notes`: what stays
    whole, and why. `size_rules`, `fused`: from a run on shards, see `LocalSizes`.
    """

    params: Mapping[int, Share]
    attributes: Sequence[Attribute]
    colwise: frozenset[int]
    regions: Mapping[int, frozenset[int]]
    whole: frozenset[int]
    limits: tuple[TpLimit, ...]
    vocab_size: int | None
    notes: tuple[str, ...]
    size_rules: Mapping[int, Mapping[int, SizeRule]] = field(default_factory=dict)
    fused: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


def sharding_of(
    model: nn.Module,
    regions: Sequence[Region],
    vocabulary: Sequence[nn.Module],
    whole: frozenset[int] = frozenset(),
) -> Sharding:
    """Resolve regions and vocabulary into shares. Raises Unsupported when nothing is divided.

    A region with a unit of 1 (one key/value head) stays whole.
    """
    divided = [region for region in regions if region.unit > 1]
    if not divided:
        raise UnsupportedRules("no matrices that tensor parallelism could divide; t = 1 only")
    shares: dict[int, Share] = {}
    for region in divided:
        shares |= _shares(region)
    vocab_size, tables = _share_vocabulary(model, vocabulary, shares)
    attributes = [item for region in divided for item in _attributes(region)]
    return Sharding(
        params=shares,
        attributes=[*attributes, *tables],
        colwise=frozenset(id(m.module) for region in divided for m in region.colwise)
        | frozenset(id(m) for m in vocabulary if isinstance(m, nn.Linear)),
        regions={
            id(region.rowwise[0].module): frozenset(id(m.module) for m in region.colwise)
            for region in divided
            if region.rowwise
        },
        whole=whole,
        limits=tuple(dict.fromkeys(limit for region in divided for limit in _limits(region))),
        vocab_size=vocab_size,
        notes=(),
    )


def _shares(region: Region) -> dict[int, Share]:
    unit, shares = region.unit, dict[int, Share]()
    for matrix in region.colwise:
        share = Share(
            unit=unit,
            multiple=matrix.num_out // unit,
            dim=matrix.out_dim,
            pieces=matrix.pieces,
        )
        shares[id(matrix.weight)] = share
        if matrix.bias is not None:
            shares[id(matrix.bias)] = replace(share, dim=matrix.bias.dim() - 1)
    for matrix in region.rowwise:
        multiple = matrix.num_in // unit
        shares[id(matrix.weight)] = Share(unit=unit, multiple=multiple, dim=matrix.in_dim)
    for parameter in region.per_head():
        shares[id(parameter)] = Share(unit=unit, multiple=len(parameter) // unit)
    return shares


def _limits(region: Region) -> Iterator[TpLimit]:
    unit, heads = region.unit, region.width // region.grain
    if region.grain == 1:
        yield TpLimit(label=region.label, size=unit)
        return
    yield TpLimit(label="attention heads", size=heads)
    if unit != heads:
        yield TpLimit(label="key/value heads", size=unit)


def _attributes(region: Region) -> Iterator[Attribute]:
    """Numbers that a forward reads, and that are smaller on a rank."""
    unit = region.unit
    for matrix in region.colwise:
        if hasattr(matrix.module, "nf"):  # transformers' Conv1D reads its number of outputs
            yield vars(matrix.module), "nf", Share(unit=unit, multiple=matrix.num_out // unit)
    if region.grain == 1:
        return
    wanted = dict.fromkeys((*HEADS, *KV_HEADS), region.counts)
    wanted |= {name: {region.width} for name in WIDTHS}
    for owner in region.owners:
        table = vars(owner)
        for name, sizes in wanted.items():
            if type(table.get(name)) is int and table[name] in sizes:
                yield table, name, Share(unit=unit, multiple=table[name] // unit)


def _share_vocabulary(
    model: nn.Module, modules: Sequence[nn.Module], shares: dict[int, Share]
) -> tuple[int | None, list[Attribute]]:
    """Embedding and output head: rows are the vocabulary. The loss reads its size."""
    sizes: dict[int, list[nn.Module]] = defaultdict(list)
    for module in modules:
        assert isinstance(module.weight, torch.Tensor)
        sizes[module.weight.shape[0]].append(module)
    if not sizes:
        return None, []
    vocab_size = max(sizes)
    share = Share(unit=vocab_size, multiple=1)
    for module in sizes[vocab_size]:
        shares[id(module.weight)] = share
        if getattr(module, "bias", None) is not None:
            shares[id(module.bias)] = share
    owners = [getattr(model, "config", None), *model.modules()]
    tables = [vars(owner) for owner in owners if getattr(owner, "vocab_size", None) == vocab_size]
    return vocab_size, [(t, "vocab_size", share) for t in tables if "vocab_size" in t]


def with_whole_vocabulary(sharding: Sharding, model: nn.Module) -> Sharding:
    """The same with embedding and head whole on every rank: a user's own loss reads all logits."""
    if sharding.vocab_size is None:
        return sharding
    share = Share(unit=sharding.vocab_size, multiple=1)
    # A layer may be as wide as the vocabulary.
    inside = set(sharding.regions).union(*sharding.regions.values())
    outside = (module for module in model.modules() if id(module) not in inside)
    own = {id(weight) for module in outside for weight in module.parameters(recurse=False)}
    whole = {key for key in own if sharding.params.get(key) == share}
    linear = (module for module in model.modules() if isinstance(module, nn.Linear))
    heads = frozenset(id(module) for module in linear if id(module.weight) in whole)
    return replace(
        sharding,
        params={key: value for key, value in sharding.params.items() if key not in whole},
        attributes=[each for each in sharding.attributes if each[1] != "vocab_size"],
        colwise=sharding.colwise - heads,
        vocab_size=None,
        notes=(*sharding.notes, WHOLE_VOCABULARY),
    )


def matrix_of(module: nn.Module) -> Matrix | None:
    """The matrix of a linear layer, or None. Transformers' Conv1D stores [inputs, outputs]."""
    conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    if not isinstance(module, nn.Linear) and not conv1d:
        return None
    weight, bias = module.weight, module.bias
    assert isinstance(weight, torch.Tensor) and isinstance(bias, torch.Tensor | None)
    out_dim = int(conv1d)
    return Matrix(weight=weight, bias=bias, module=module, out_dim=out_dim, in_dim=1 - out_dim)


def first_int(owner: object, names: Sequence[str]) -> int | None:
    """The first of these attributes that is a number."""
    values = (getattr(owner, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)
