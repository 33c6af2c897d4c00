"""Regions of tensor parallelism from a model's own tp_plan.

A rule names a module or parameter (wildcards allowed) and a style, as Hugging Face writes them.
The matrices under one parent are one region. Experts (`moe_tp_experts`) are a region of their own,
with one matrix per expert in one parameter; routing in front of them works on all tokens.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Final

from torch import nn

from mist.model.summary import TpLimit
from mist.trace.tensor_parallel.tp_sharding import (
    HEAD_DIMS,
    HEADS,
    Matrix,
    Region,
    Sharding,
    UnsupportedRules,
    first_int,
    matrix_of,
    sharding_of,
)

PACKED: Final = "packed_colwise"  # gates and inputs: two halves
SIDE_BY_SIDE: Final = 2
COLWISE: Final = frozenset({"colwise", PACKED, "colwise_gather_output"})
ROWWISE: Final = frozenset({"rowwise", "packed_rowwise"})
EMBEDDING: Final = frozenset({"embedding_rowwise", "colwise", "rowwise", "colwise_gather_output"})
EXPERTS: Final = "moe_tp_experts"
GATHERING: Final = "rowwise_split_input"
# Styles whose matrices stay whole on every rank.
WHOLE: Final = frozenset({"replicate", "replicated_with_grad_allreduce", "sequence_parallel"})

Plan = Mapping[str, str]


def plan_of_model(model: nn.Module) -> Plan | None:
    """The model's plan, if it divides activations: not where it gathers what every matrix makes.

    Nor where it names nothing but the vocabulary.
    """
    plan: Plan = getattr(model, "tp_plan", None) or {}
    if GATHERING in plan.values():
        return None
    inside = (
        _style(plan, path)
        for path, module in model.named_modules()
        if not _is_vocabulary(model, path, module)
    )
    return plan if any(style is not None and style not in WHOLE for style in inside) else None


def planned_heads(model: nn.Module) -> Iterator[TpLimit]:
    """The numbers of heads that the plan of a model divides, by its configuration."""
    config, plan = getattr(model, "config", None), plan_of_model(model)
    if getattr(config, "is_heterogeneous", False):  # layers have numbers of heads of their own
        return
    heads = getattr(config, "num_attention_heads", None)
    shared = getattr(config, "num_key_value_heads", heads)
    divided = plan is not None and any(
        path.endswith("q_proj") and _style(plan, path) == "colwise"
        for path, _ in model.named_modules()
    )
    # One key and value head for all leaves the attention whole.
    if divided and isinstance(heads, int) and isinstance(shared, int) and shared > 1:
        yield TpLimit(label="attention heads", size=heads)
        if shared != heads:
            yield TpLimit(label="key/value heads", size=shared)


def sharding_by_plan(model: nn.Module, plan: Plan, left: frozenset[int] = frozenset()) -> Sharding:
    """What the plan divides; a region with a style that Mist does not know stays whole.

    As does one with a module in `left`. Raises Unsupported when nothing else is divided.
    """
    regions: dict[str, Region] = {}
    unknown: dict[str, str] = {}
    whole: list[nn.Module] = []
    tables = [each for each in _planned(model, plan) if _is_vocabulary(model, each[0], each[1])]
    for path, module, style in _planned(model, plan):
        parent = path.rpartition(".")[0]
        if _is_vocabulary(model, path, module):
            continue
        if style == EXPERTS:
            regions[path] = _experts(plan, path, module)
            whole.append(model.get_submodule(parent))
        else:
            region = regions.setdefault(parent, Region(owners=[model.get_submodule(parent)]))
            if not _add(region, module, style):
                unknown.setdefault(parent, _unknown(path, module, style))
    for parent in unknown:
        del regions[parent]
        # It may mix tokens, as attention does.
        whole.append(model.get_submodule(parent))
    if unknown and not regions:
        raise UnsupportedRules(f"{next(iter(unknown.values()))}; t = 1 only")
    known = [
        replace(region, head_dim=_head_dim(region))
        for region in regions.values()
        if not region.has_any(left)
    ]
    vocabulary = [_known_table(*table) for table in tables]
    return sharding_of(model, known, vocabulary, frozenset(map(id, whole)))


def _planned(model: nn.Module, plan: Plan) -> Iterator[tuple[str, nn.Module, str]]:
    """Modules with their paths and the styles that divide them."""
    for path, module in model.named_modules():
        style = _style(plan, path)
        if style is not None and style not in WHOLE:
            yield path, module, style


def _style(plan: Plan, path: str) -> str | None:
    return next((style for rule, style in plan.items() if fnmatchcase(path, rule)), None)


def _is_vocabulary(model: nn.Module, path: str, module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding):
        return True
    get_head = getattr(model, "get_output_embeddings", None)
    return module is get_head() if get_head else "." not in path and isinstance(module, nn.Linear)


def _known_table(path: str, module: nn.Module, style: str) -> nn.Module:
    if style not in EMBEDDING:
        raise UnsupportedRules(f"{_unknown(path, module, style)}; t = 1 only")
    return module


def _unknown(path: str, module: nn.Module, style: str) -> str:
    return (
        f"tensor-parallel style {style!r} of {path} ({type(module).__name__}) is not known to Mist"
    )


def _add(region: Region, module: nn.Module, style: str) -> bool:
    """Put a module into its region; whether its style and kind are known."""
    matrix = matrix_of(module)
    if matrix is None or style not in (COLWISE | ROWWISE) - {"colwise_gather_output"}:
        return False
    (region.colwise if style in COLWISE else region.rowwise).append(matrix)
    return True


def _experts(plan: Plan, path: str, module: nn.Module) -> Region:
    """Parameters [experts, outputs, inputs], divided as their own rules say."""
    region = Region(owners=[module], label="expert width")
    for matrix, name in _stacked(module):
        style = _style(plan, f"{path}.{name}")
        if style in COLWISE:
            pieces = SIDE_BY_SIDE if style == PACKED else 1
            region.colwise.append(replace(matrix, pieces=pieces))
        elif style in ROWWISE:
            region.rowwise.append(matrix)
    return region


def _stacked(module: nn.Module) -> Iterator[tuple[Matrix, str]]:
    for name, weight in module.named_parameters(recurse=False):
        if weight.dim() == 3:
            bias = getattr(module, f"{name}_bias", None)
            yield Matrix(weight=weight, bias=bias, module=module, out_dim=1, in_dim=2), name


def _head_dim(region: Region) -> int | None:
    parent, width = region.owners[0], region.width
    head_dim, heads = first_int(parent, HEAD_DIMS), first_int(parent, HEADS)
    if head_dim is None and heads is not None and width % heads == 0:
        return width // heads
    return head_dim
