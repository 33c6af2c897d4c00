"""Tensor parallelism as symbolic shapes: which dimension of which parameter a rank holds 1/t of.

A rule names a module (wildcards allowed) colwise, rowwise or embedding_rowwise, as Hugging Face
writes them. Colwise: outputs over ranks (heads, MLP width); rowwise: inputs, then one reduction;
embedding_rowwise: vocabulary. The matrices under one parent share a *unit*: the greatest number of
equal shares that cuts no head. A run gives the unit a symbol u meaning unit / t, so a local size
is multiple * u.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import gcd
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import nn

from mist.facts import TpLimit

COLWISE, ROWWISE, EMBEDDING = "colwise", "rowwise", "embedding_rowwise"
# Styles whose matrices stay whole on every rank.
WHOLE: Final = frozenset({"replicate", "replicated_with_grad_allreduce", "sequence_parallel"})

GPT2: Final = MappingProxyType(
    {
        "transformer.wte": EMBEDDING,
        "transformer.h.*.attn.c_attn": COLWISE,
        "transformer.h.*.attn.c_proj": ROWWISE,
        "transformer.h.*.mlp.c_fc": COLWISE,
        "transformer.h.*.mlp.c_proj": ROWWISE,
        "lm_head": COLWISE,
    }
)
BY_MODEL_TYPE: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType({"gpt2": GPT2})

# Attributes of an attention module that hold a number of heads or the width of all heads.
HEADS: Final = ("num_heads", "n_heads", "n_head", "num_attention_heads", "n_local_heads")
KV_HEADS: Final = ("num_kv_heads", "num_key_value_heads", "n_kv_heads", "n_local_kv_heads")
WIDTHS: Final = ("split_size",)
HEAD_DIMS: Final = ("head_dim", "head_size", "attention_head_size")


class Unsupported(Exception):
    """Why the model's tensor-parallel rules cannot be used; becomes a note."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A dimension of which a rank holds `multiple * unit / t`."""

    unit: int
    multiple: int
    dim: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """What a rank holds of a model. Parameters and modules are meant by identity."""

    params: Mapping[int, Share]
    attributes: Sequence[tuple[dict[str, Any], str, Share]]
    colwise: frozenset[int]
    rowwise: frozenset[int]
    limits: tuple[TpLimit, ...]
    vocab_size: int | None


@dataclass(slots=True)
class _Group:
    """The sharded matrices under one parent module."""

    parent: nn.Module
    colwise: list[nn.Module] = field(default_factory=list)
    rowwise: list[nn.Module] = field(default_factory=list)


def find_sharding(model: nn.Module) -> Sharding:
    """The model's tensor-parallel rules, resolved. Raises Unsupported, with the reason."""
    rules = _rules(model)
    if not rules:
        raise Unsupported("no tensor-parallel rules are known for this model (tp_plan); t = 1 only")
    groups, vocabulary = _match(model, rules)
    shares: dict[int, Share] = {}
    attributes: list[tuple[dict[str, Any], str, Share]] = []
    limits: dict[TpLimit, None] = {}
    for group in groups:
        _share_group(group, shares, attributes, limits)
    vocab_size = _share_vocabulary(model, vocabulary, shares, attributes)
    return Sharding(
        params=shares,
        attributes=attributes,
        colwise=frozenset(id(m) for g in groups for m in g.colwise)
        | frozenset(id(m) for m in vocabulary if isinstance(m, nn.Linear)),
        rowwise=frozenset(id(m) for g in groups for m in g.rowwise),
        limits=tuple(limits),
        vocab_size=vocab_size,
    )


def _rules(model: nn.Module) -> Mapping[str, str]:
    own = getattr(model, "tp_plan", None) or {}
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    return own or BY_MODEL_TYPE.get(model_type, {})


def _match(model: nn.Module, rules: Mapping[str, str]) -> tuple[list[_Group], list[nn.Module]]:
    """The matched matrices by parent, and those whose rows are the vocabulary."""
    groups: dict[str, _Group] = {}
    vocabulary: list[nn.Module] = []
    for path, module in model.named_modules():
        style = next((s for rule, s in rules.items() if fnmatchcase(path, rule)), None)
        if style is None or style in WHOLE:
            continue
        if isinstance(module, nn.Embedding) or _is_head(model, path, module):
            vocabulary.append(module)
            continue
        parent = path.rpartition(".")[0]
        group = groups.setdefault(parent, _Group(model.get_submodule(parent)))
        _add(group, module, style, path)
    return list(groups.values()), vocabulary


def _is_head(model: nn.Module, path: str, module: nn.Module) -> bool:
    get_head = getattr(model, "get_output_embeddings", None)
    return module is get_head() if get_head else "." not in path and isinstance(module, nn.Linear)


def _add(group: _Group, module: nn.Module, style: str, path: str) -> None:
    if style not in (COLWISE, ROWWISE) or not (isinstance(module, nn.Linear) or _is_conv1d(module)):
        raise Unsupported(
            f"tensor-parallel style {style!r} of {path} ({type(module).__name__}) is not known to "
            "Mist; t = 1 only"
        )
    (group.colwise if style == COLWISE else group.rowwise).append(module)


def _is_conv1d(module: nn.Module) -> bool:
    """Transformers' Conv1D: a linear layer with its weight stored [inputs, outputs]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _dims(module: nn.Module) -> tuple[int, int]:
    """The weight's (output, input) dimensions."""
    return (1, 0) if _is_conv1d(module) else (0, 1)


def _size(module: nn.Module, style: str) -> int:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[_dims(module)[0 if style == COLWISE else 1]]


def _share_group(
    group: _Group,
    shares: dict[int, Share],
    attributes: list[tuple[dict[str, Any], str, Share]],
    limits: dict[TpLimit, None],
) -> None:
    sizes = [_size(m, COLWISE) for m in group.colwise] + [_size(m, ROWWISE) for m in group.rowwise]
    width = max((_size(m, ROWWISE) for m in group.rowwise), default=max(sizes))
    head_dim = _head_dim(group.parent, width)
    grain = head_dim if head_dim and all(size % head_dim == 0 for size in sizes) else 1
    unit = gcd(*sizes) // grain
    for module in group.colwise:
        _share_colwise(module, unit, shares, attributes)
    for module in group.rowwise:
        share = Share(unit=unit, multiple=_size(module, ROWWISE) // unit, dim=_dims(module)[1])
        shares[id(module.weight)] = share
    if grain == 1:
        limits[TpLimit(label="MLP width", size=unit)] = None
        return
    limits[TpLimit(label="attention heads", size=width // grain)] = None
    if unit != width // grain:
        limits[TpLimit(label="key/value heads", size=unit)] = None
    attributes.extend(_head_attributes(group.parent, width, grain, unit))


def _share_colwise(
    module: nn.Module,
    unit: int,
    shares: dict[int, Share],
    attributes: list[tuple[dict[str, Any], str, Share]],
) -> None:
    multiple = _size(module, COLWISE) // unit
    shares[id(module.weight)] = Share(unit=unit, multiple=multiple, dim=_dims(module)[0])
    if getattr(module, "bias", None) is not None:
        shares[id(module.bias)] = Share(unit=unit, multiple=multiple)
    if _is_conv1d(module):
        attributes.append((vars(module), "nf", Share(unit=unit, multiple=multiple)))


def _head_dim(parent: nn.Module, width: int) -> int | None:
    head_dim = _first_int(parent, HEAD_DIMS)
    heads = _first_int(parent, HEADS)
    if head_dim is None and heads is not None and width % heads == 0:
        return width // heads
    return head_dim


def _first_int(module: nn.Module, names: Sequence[str]) -> int | None:
    values = (getattr(module, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def _head_attributes(
    parent: nn.Module, width: int, head_dim: int, unit: int
) -> Iterator[tuple[dict[str, Any], str, Share]]:
    """Numbers that the module's forward reads, and that are smaller on a rank."""
    whole = {width // head_dim: HEADS, unit: KV_HEADS}
    whole = {width // head_dim: HEADS + KV_HEADS} if len(whole) == 1 else whole
    for size, names in [*whole.items(), (width, WIDTHS)]:
        for name in names:
            if vars(parent).get(name) == size:
                yield vars(parent), name, Share(unit=unit, multiple=size // unit)


def _share_vocabulary(
    model: nn.Module,
    modules: Sequence[nn.Module],
    shares: dict[int, Share],
    attributes: list[tuple[dict[str, Any], str, Share]],
) -> int | None:
    """Embedding and output head: rows are the vocabulary. The loss reads its size."""
    sizes: dict[int, list[nn.Module]] = defaultdict(list)
    for module in modules:
        assert isinstance(module.weight, torch.Tensor)
        sizes[module.weight.shape[0]].append(module)
    if not sizes:
        return None
    vocab_size = max(sizes)
    share = Share(unit=vocab_size, multiple=1)
    for module in sizes[vocab_size]:
        shares[id(module.weight)] = share
        if getattr(module, "bias", None) is not None:
            shares[id(module.bias)] = share
    owners = [getattr(model, "config", None), *model.modules()]
    tables = [vars(owner) for owner in owners if getattr(owner, "vocab_size", None) == vocab_size]
    attributes.extend((table, "vocab_size", share) for table in tables if "vocab_size" in table)
    return vocab_size
