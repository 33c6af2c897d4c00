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
from mist.trace.dispatch_call import tensors_in
from mist.trace.operations.sized_calls import SizeRule

# Attributes of an attention module that hold a number of heads or the width of all heads.
HEADS: Final = ("num_heads", "n_heads", "n_head", "num_attention_heads", "n_local_heads")
KV_HEADS: Final = ("num_kv_heads", "num_key_value_heads", "n_kv_heads", "n_local_kv_heads")
WIDTHS: Final = ("split_size", "all_head_size", "inner_dim")
VOCAB_SIZE: Final = "vocab_size"
IN_ONE: Final = ("in_proj_weight",)  # of nn.MultiheadAttention
SEPARATE: Final = ("q_proj_weight", "k_proj_weight", "v_proj_weight")  # of nn.MultiheadAttention
ATTENDED: Final = ("query", "key", "value")  # what it is given
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
    rank; `head_dim` is None for an MLP. `heads_alike`: whether it is the size of all heads, of
    queries too; else every matrix has as many. `pairs`: weights of both keys and values. `given`:
    numbers of heads of keys and values that earlier layers made. `label`: what is divided when no
    heads are. `entered`, `ends`: modules that are given what enters, and those whose results are
    summed, where they are not the matrices themselves. `norms`: modules whose norms go over what
    ranks divide.
    """

    owners: Sequence[object]
    head_dim: int | None = None
    heads_alike: bool = True
    pairs: frozenset[int] = frozenset()
    given: frozenset[int] = frozenset()
    label: str = "MLP width"
    colwise: list[Matrix] = field(default_factory=list)
    rowwise: list[Matrix] = field(default_factory=list)
    entered: Sequence[nn.Module] = ()
    ends: Sequence[nn.Module] = ()
    norms: Sequence[nn.Module] = ()

    def has_any(self, modules: frozenset[int]) -> bool:
        """Whether a matrix of it is in one of these modules."""
        return any(id(matrix.module) in modules for matrix in (*self.colwise, *self.rowwise))

    @property
    def grain(self) -> int:
        """What must not be cut: the size of a head where all matrices consist of heads."""
        sizes = [*(m.num_out for m in self.colwise), *(m.num_in for m in self.rowwise)]
        if self.head_dim is None or (self.heads_alike and any(n % self.head_dim for n in sizes)):
            return 1
        return self.head_dim

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
        if not self.heads_alike:
            return {queries}
        pairs = {m.num_out // self.grain // 2 for m in self.colwise if id(m.weight) in self.pairs}
        outputs = {m.num_out // self.grain for m in self.colwise if id(m.weight) not in self.pairs}
        inputs = {matrix.num_in // self.grain for matrix in self.rowwise}
        fused = {(n - queries) // 2 for n in outputs if n > queries} if self.grain > 1 else set()
        return outputs | inputs | fused | pairs | self.given

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
class DividedRegion:
    """The modules of a region, by identity.

    `columns`, `rows`: column- and row-parallel; `entered`: those that are given what enters;
    `ends`: those whose results are summed over the ranks; `norms`: those with means over what ranks
    divide.
    """

    columns: frozenset[int]
    rows: frozenset[int]
    entered: frozenset[int]
    ends: frozenset[int]
    norms: frozenset[int]

    @property
    def around(self) -> frozenset[int]:
        """Modules with matrices of the region in them: they have all tokens."""
        return (self.entered | self.ends) - self.columns - self.rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """The part of a model on a rank. Parameters and modules are meant by identity.

    `colwise`: column-parallel modules. `whole`: modules that need all tokens also
    where they hold nothing divided (attention whose heads cannot be, routing). `notes`: what stays
    whole, and why. `pairs`: weights of both keys and values. `size_rules`, `fused`: from a run on
    shards, see `LocalSizes`.
    """

    params: Mapping[int, Share]
    attributes: Sequence[Attribute]
    colwise: frozenset[int]
    regions: tuple[DividedRegion, ...]
    whole: frozenset[int]
    limits: tuple[TpLimit, ...]
    vocab_size: int | None
    notes: tuple[str, ...]
    size_rules: Mapping[int, Mapping[int, SizeRule]] = field(default_factory=dict)
    fused: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    pairs: frozenset[int] = frozenset()

    @property
    def divided(self) -> frozenset[int]:
        """Modules of regions with divided parameters."""
        return frozenset(each for region in self.regions for each in region.columns | region.rows)

    @property
    def ends(self) -> frozenset[int]:
        """Modules whose results are summed over the ranks."""
        return frozenset(each for region in self.regions for each in region.ends)

    @property
    def norms(self) -> frozenset[int]:
        """Modules whose norms go over what ranks divide."""
        return frozenset(each for region in self.regions for each in region.norms)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankModules:
    """What is special to a rank of tensor parallelism, by identity.

    `all_tokens`: modules that have all tokens; `summed`: those of which a rank has a part of a sum;
    `norms`: those whose means are of all ranks; `columns`: column-parallel parameters. `entrances`:
    modules that are given what enters a region.
    """

    all_tokens: frozenset[int] = frozenset()
    summed: frozenset[int] = frozenset()
    norms: frozenset[int] = frozenset()
    columns: frozenset[int] = frozenset()
    entrances: frozenset[int] = frozenset()


def rank_modules(sharding: Sharding | None, model: nn.Module) -> RankModules:
    """What is special to a rank of a model; nothing, where nothing is divided."""
    if sharding is None:
        return RankModules()
    columns = (module for module in model.modules() if id(module) in sharding.colwise)
    around = (each for region in sharding.regions for each in region.around)
    ends = (each for region in sharding.regions for each in region.ends - region.rows)
    return RankModules(
        all_tokens=sharding.whole.union(around, sharding.norms),
        summed=sharding.whole.union(ends),
        norms=sharding.norms,
        columns=frozenset(id(p) for module in columns for p in module.parameters(recurse=False)),
        entrances=frozenset().union(*(r.entered | r.columns for r in sharding.regions)),
    )


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
        regions=tuple(_modules(region) for region in divided if region.rowwise),
        whole=whole,
        limits=tuple(dict.fromkeys(limit for region in divided for limit in _limits(region))),
        vocab_size=vocab_size,
        notes=(),
        pairs=frozenset().union(*(region.pairs for region in divided)),
    )


def _modules(region: Region) -> DividedRegion:
    columns = frozenset(id(matrix.module) for matrix in region.colwise)
    rows = frozenset(id(matrix.module) for matrix in region.rowwise)
    return DividedRegion(
        columns=columns,
        rows=rows,
        entered=frozenset(map(id, region.entered)) or columns,
        ends=frozenset(map(id, region.ends)) or rows,
        norms=frozenset(map(id, region.norms)),
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
            shares[id(matrix.bias)] = _of_bias(matrix, matrix.bias, share)
    for matrix in region.rowwise:
        multiple = matrix.num_in // unit
        shares[id(matrix.weight)] = Share(unit=unit, multiple=multiple, dim=matrix.in_dim)
    for parameter in region.per_head():
        shares[id(parameter)] = Share(unit=unit, multiple=len(parameter) // unit)
    for norm in region.norms:
        for parameter in norm.parameters():
            shares[id(parameter)] = Share(unit=unit, multiple=len(parameter) // unit)
    return shares


def _of_bias(matrix: Matrix, bias: torch.Tensor, share: Share) -> Share:
    """The share of a bias, which may be that of several matrices side by side."""
    dim, matrices = bias.dim() - 1, bias.shape[-1] // matrix.num_out
    multiple, pieces = share.multiple * matrices, share.pieces * matrices
    return replace(share, dim=dim, multiple=multiple, pieces=pieces)


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
        # Torch checks the numbers of its own attention against the width of what enters.
        table = vars(owner) if not isinstance(owner, nn.MultiheadAttention) else {}
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
    tables = [vars(owner) for owner in owners if getattr(owner, VOCAB_SIZE, None) == vocab_size]
    return vocab_size, [(t, VOCAB_SIZE, share) for t in tables if VOCAB_SIZE in t]


def with_whole_vocabulary(sharding: Sharding, model: nn.Module) -> Sharding:
    """The same with embedding and head whole on every rank: a user's own loss reads all logits."""
    if sharding.vocab_size is None:
        return sharding
    share = Share(unit=sharding.vocab_size, multiple=1)
    # A layer may be as wide as the vocabulary.
    inside = sharding.divided
    outside = (module for module in model.modules() if id(module) not in inside)
    own = {id(weight) for module in outside for weight in module.parameters(recurse=False)}
    whole = {key for key in own if sharding.params.get(key) == share}
    linear = (module for module in model.modules() if isinstance(module, nn.Linear))
    heads = frozenset(id(module) for module in linear if id(module.weight) in whole)
    return replace(
        sharding,
        params={key: value for key, value in sharding.params.items() if key not in whole},
        attributes=[each for each in sharding.attributes if each[1] != VOCAB_SIZE],
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


def matrices_of(module: nn.Module) -> Sequence[Matrix]:
    """The matrices that a module's own forward multiplies with.

    Torch's attention has those of queries, keys and values, in one or apart, and the one behind.
    """
    if not isinstance(module, nn.MultiheadAttention):
        matrix = matrix_of(module)
        return [] if matrix is None else [matrix]
    names = IN_ONE if module._qkv_same_embed_dim else SEPARATE
    each = [getattr(module, name) for name in names]
    row = matrix_of(module.out_proj)
    assert row is not None
    column = Matrix(
        weight=row.weight,
        bias=module.in_proj_bias,
        module=module,
        out_dim=0,
        in_dim=1,
        pieces=len(SEPARATE) // len(each),
    )
    columns = [replace(column, weight=weight) for weight in each]
    return [*columns, replace(row, module=module)]


def matrices_in(model: nn.Module) -> dict[int, Matrix]:
    """All matrices of a model, by weight; each with the module whose forward reads it."""
    # A module that reads those of modules in it comes before them, and counts.
    return {id(m.weight): m for each in reversed([*model.modules()]) for m in matrices_of(each)}


def module_over_tokens(layer: nn.Module, name: str) -> nn.Module:
    """What has all tokens where a module of a layer goes over them: it, or matrices around it.

    A convolution, a scan: they need all tokens, also where sequence parallelism divides them.
    """
    path = [layer, *path_to(layer.get_submodule(name), layer)]
    return next((module for module in reversed(path) if matrices_in(module)), layer)


def path_to(module: nn.Module | None, layer: nn.Module) -> list[nn.Module]:
    """The modules of a layer around one that is in it, and itself, from the outside."""
    return [m for m in layer.modules() if m is not layer and any(i is module for i in m.modules())]


def entering(
    module: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]
) -> list[torch.Tensor]:
    """What a call gives the column-parallel matrices of a module to read, each tensor once."""
    if not isinstance(module, nn.MultiheadAttention):
        return list(tensors_in((args, kwargs)))[:1]
    named = dict(zip(ATTENDED, args, strict=False)) | dict(kwargs)
    return list({id(x): x for x in tensors_in([named[name] for name in ATTENDED])}.values())


def first_int(owner: object, names: Sequence[str]) -> int | None:
    """The first of these attributes that is a number."""
    values = (getattr(owner, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)
