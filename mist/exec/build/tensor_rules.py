"""Which modules tensor parallelism divides, by name, and where their input enters.

The shares are those that the trace found (`mist.trace.tensor_parallel.tp_sharding`). An input that
several matrices of a region read is gathered once, where it enters: at the outermost module below
the layer that is given that tensor and hands it to those matrices alone. That makes two entries and
two exits in a layer, not one for each matrix.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import takewhile
from os.path import commonpath
from typing import Any, Final, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mist.errors import ModelError
from mist.exec.build.model_structure import ModelStructure
from mist.exec.build.tensor_parts import PartRule
from mist.plans.workload import Attention, Precision
from mist.trace.models.loader import LoadedModel
from mist.trace.models.source import TraceSetting
from mist.trace.operations.sized_calls import SizeRule
from mist.trace.recording.shim import runs_anywhere
from mist.trace.repeated_blocks import signature
from mist.trace.runs import sharding_rules
from mist.trace.tensor_parallel.tp_apply import attends, undivided
from mist.trace.tensor_parallel.tp_sharding import (
    VOCAB_SIZE,
    Sharding,
    UnsupportedRules,
    entering,
    matrices_in,
    matrices_of,
    matrix_of,
)

CONFIG: Final = "config."  # an attribute of a module's configuration begins so
GETTERS: Final = ("__get__", "size", "dim", "stride")


Move = Callable[[str], str]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionRule:
    """Column-parallel matrices, the row-parallel ones behind them, and where they are entered.

    `entries`: of each module that is given what enters (a column-parallel one, or one around it)
    the module at which that enters. `ends`: modules whose results are summed, `block` if it is one
    region with others.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    entries: Mapping[str, str]
    ends: tuple[str, ...]
    attends: bool
    block: str | None

    def moved(self, move: "Move") -> "RegionRule":
        """The same region of another layer."""
        entries = {move(column): move(entry) for column, entry in self.entries.items()}
        columns, rows, ends = (tuple(map(move, n)) for n in (self.columns, self.rows, self.ends))
        block = None if self.block is None else move(self.block)
        return replace(self, columns=columns, rows=rows, entries=entries, ends=ends, block=block)

    def is_in(self, *layers: str) -> bool:
        """Whether it lies in one of these layers."""
        return self.rows[0].startswith(tuple(f"{layer}." for layer in layers))


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRules:
    """Modules and parameters that ranks divide.

    `local`: numbers (module, attribute, perhaps one of its configuration) that are smaller on a
    rank; `sizes`: of the calls of a module's forward. `places`: arguments of the entries that
    enter, of those that are given more (keywords behind positions); without one every activation
    does. `parts`: of modules that torch's parallel styles do not know, by parameter. `whole`:
    modules that need all tokens, in which nothing is divided. `norms`: modules whose norms go over
    what ranks divide. `direct`: layer 0 takes the result of the embedding as it is.
    """

    regions: tuple[RegionRule, ...]
    parts: Mapping[str, Mapping[str, PartRule]]
    whole: frozenset[str]
    norms: frozenset[str]
    embedding: str | None
    head: str | None
    direct: bool
    local: Mapping[tuple[str, str], int]
    sizes: Mapping[str, Mapping[int, SizeRule]]
    places: Mapping[str, frozenset[int]]


def tensor_rules(
    loaded: LoadedModel, structure: ModelStructure, seq_len: int, tp: int
) -> TensorRules:
    """The rules of a model for `tp` ranks. Raises ModelError when they cannot be run."""
    try:
        setting = TraceSetting(precision=Precision.FP32, attention=Attention.FLASH, seq_len=seq_len)
        sharding = sharding_rules(loaded, setting)
    except UnsupportedRules as reason:
        raise ModelError(f"tp {tp}: {loaded.name}: {reason}.") from reason
    model = loaded.module
    if words := undivided(model, sharding):
        raise ModelError(f"tp {tp}: mist apply cannot divide {loaded.name}: {words}; use tp 1")
    names = {id(module): name for name, module in model.named_modules()}
    around = {names[each] for region in sharding.regions for each in region.around}
    inputs = _inputs(loaded, structure, seq_len, frozenset(around))
    blocks = frozenset(_outermost(names[each] for each in sharding.whole))
    traced_regions = tuple(_regions(loaded, sharding, names, inputs, blocks))
    like = _like(loaded, structure, traced_regions)
    regions = tuple(
        region.moved(_mover(known, layer))
        for layer, known in like.items()
        for region in traced_regions
        if region.is_in(known)
    )
    table, head = _vocabulary(loaded, sharding, regions, tp)
    return TensorRules(
        regions=regions,
        parts=_everywhere(_parts(model, sharding), like),
        whole=frozenset(_everywhere(dict.fromkeys(blocks), like)) - {r.block for r in regions},
        norms=frozenset(_everywhere(dict.fromkeys(names[each] for each in sharding.norms), like)),
        embedding=table,
        head=head,
        direct=table is not None and table == structure.direct,
        local=_numbers(_everywhere(_local(model, sharding, tp), like)),
        places=_everywhere(inputs.places(traced_regions), like),
        sizes=_everywhere(
            {names[key]: rules for key, rules in sharding.size_rules.items() if rules}, like
        ),
    )


def _numbers(by_owner: Mapping[str, Mapping[str, int]]) -> dict[tuple[str, str], int]:
    """Numbers by module and attribute."""
    return {
        (owner, attribute): value
        for owner, values in by_owner.items()
        for attribute, value in values.items()
    }


def _mover(source: str, target: str) -> Move:
    """Names within one layer, for another one that is like it."""
    return lambda name: target + name.removeprefix(source)


def _around(names: Sequence[str]) -> str:
    """The innermost module that has all of these in it."""
    paths = [f"/{name.replace('.', '/')}" for name in names]
    return commonpath(paths)[1:].replace("/", ".")


def _outermost(names: Iterable[str]) -> Iterator[str]:
    """Modules that lie in no other one of them."""
    every = set(names)
    return (n for n in every if not any(n.startswith(f"{other}.") for other in every))


def _vocabulary(
    loaded: LoadedModel, sharding: Sharding, regions: Sequence[RegionRule], tp: int
) -> tuple[str | None, str | None]:
    """Embedding and head, if they are divided; both stay whole where tp does not divide them."""
    modules = dict(loaded.module.named_modules())
    inside = {name for region in regions for name in region.columns}
    tables = {
        name: module.num_embeddings
        for name, module in modules.items()
        if isinstance(module, nn.Embedding) and id(module.weight) in sharding.params
    }
    heads = [n for n, m in modules.items() if id(m) in sharding.colwise and n not in inside]
    if any(size % tp for size in tables.values()):
        return None, None
    return next(iter(tables), None), next(iter(heads), None)


def _like(
    loaded: LoadedModel, structure: ModelStructure, regions: Sequence[RegionRule]
) -> Mapping[str, str]:
    """For each layer one that costs the same and has rules: the trace looks at one of each kind.

    Of a kind of which nothing is divided that is the first.
    """
    kinds = {layer: signature(loaded.module.get_submodule(layer)) for layer in structure.layers}
    first = {kind: layer for layer, kind in reversed(kinds.items())}
    divided = {
        kind: layer
        for layer, kind in reversed(kinds.items())
        if any(region.is_in(layer) for region in regions)
    }
    known = first | divided
    return {layer: known[kind] for layer, kind in kinds.items()}


def _everywhere(of_modules: Mapping[str, T], like: Mapping[str, str]) -> dict[str, T]:
    """What is known of modules in one layer of a kind, for all of the kind."""
    result = dict(of_modules)
    for layer, known in like.items():
        for name, value in of_modules.items():
            if name == known or name.startswith(f"{known}."):
                result[_mover(known, layer)(name)] = value
    return result


def _regions(
    loaded: LoadedModel,
    sharding: Sharding,
    names: Mapping[int, str],
    inputs: "_Inputs",
    blocks: frozenset[str],
) -> Iterator[RegionRule]:
    """Every region, of what `mist.trace.tensor_parallel.tp_apply` says can be divided."""
    matrices = {name: matrix_of(module) for name, module in loaded.module.named_modules()}
    for region in sharding.regions:
        rows, columns = (sorted(names[e] for e in ids) for ids in (region.rows, region.columns))
        block = next((each for each in blocks if rows[0].startswith(f"{each}.")), None)
        around = _around([*rows, *columns])
        entered = sorted(names[each] for each in region.entered)
        yield RegionRule(
            columns=tuple(columns),
            rows=tuple(rows),
            entries=_apart({name: block or inputs.entry(name, around) for name in entered}),
            ends=tuple(sorted({block or names[each] for each in region.ends})),
            attends=attends(sharding, matrices[rows[0]], [matrices[name] for name in columns]),
            block=block,
        )


def _apart(entries: Mapping[str, str]) -> dict[str, str]:
    """The entries of a region, none of them inside another: a gradient is summed at each of them.

    A matrix that is also given something else (positions) enters by itself, and so do then those
    that would enter at a module around it.
    """
    around = {e for e in entries.values() if any(o.startswith(f"{e}.") for o in entries.values())}
    return {name: name if entry in around else entry for name, entry in entries.items()}


def _parts(model: nn.Module, sharding: Sharding) -> dict[str, dict[str, PartRule]]:
    """Of modules with divided parameters that are neither linear layers nor tables."""
    # Modules whose parameters another one's forward reads: it has the rules.
    readers = {id(m.module) for m in matrices_in(model).values()}
    rules_by_module: dict[str, dict[str, PartRule]] = {}
    for name, module in model.named_modules():
        # Torch's style for a linear layer takes one range of its outputs, and its own forward.
        plain = type(module) is nn.Linear and len(sharding.fused.get(id(module), ())) < 2
        unread = matrix_of(module) is not None and id(module) not in readers
        if not isinstance(module, nn.Embedding) and not plain and not unread:
            rules_by_module[name] = _parts_of(module, sharding)
    return {name: rules for name, rules in rules_by_module.items() if rules}


def _parts_of(module: nn.Module, sharding: Sharding) -> dict[str, PartRule]:
    """Of one module's parameters; of torch's attention also those that it reads in another one."""
    whole = isinstance(module, nn.MultiheadAttention)
    parameters = dict(module.named_parameters(recurse=whole))
    shares = {n: sharding.params[id(p)] for n, p in parameters.items() if id(p) in sharding.params}
    fused = sharding.fused.get(id(module), ())
    rules = {
        n: PartRule(
            dim=share.dim - parameters[n].dim(), widths=fused or share.widths_of(parameters[n])
        )
        for n, share in shares.items()
    }
    if any(id(module) in region.rows for region in sharding.regions):
        # Its bias is added to the sum once.
        biases = (n for n in parameters.keys() - shares if n.endswith("bias"))
        rules |= {n: PartRule(dim=None) for n in biases}
    return rules


def _local(model: nn.Module, sharding: Sharding, tp: int) -> dict[str, dict[str, int]]:
    """By module the numbers that are smaller on a rank: its own, and those of its configuration."""
    values: dict[int, dict[str, int]] = {}
    for table, attribute, share in sharding.attributes:
        if attribute != VOCAB_SIZE:
            values.setdefault(id(table), {})[attribute] = share.multiple * share.unit // tp
    numbers: dict[str, dict[str, int]] = {}
    for name, module in model.named_modules():
        for prefix, holder in (("", module), (CONFIG, getattr(module, "config", None))):
            if own := values.get(id(getattr(holder, "__dict__", None))):
                numbers.setdefault(name, {}).update({f"{prefix}{a}": own[a] for a in own})
    return numbers


def _inputs(
    loaded: LoadedModel, structure: ModelStructure, seq_len: int, around: frozenset[str]
) -> "_Inputs":
    """Which modules are given what the linear layers read, and the modules `around` them."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = deepcopy(loaded.module)
    with mode:
        model.to_empty(device="cpu")
    watch = _Inputs(model=model, layers=frozenset(structure.layers), around=around)
    with mode, runs_anywhere(model), watch:
        fake = replace(loaded, module=model)
        fake.run(fake.batch(2, seq_len))
    return watch


@dataclass(kw_only=True, eq=False)
class _Inputs(TorchFunctionMode):
    """Notes which modules are given the same tensor, and who else reads it.

    `around`: modules that read as a linear layer does, with all that is in them.
    """

    model: nn.Module
    layers: frozenset[str]
    around: frozenset[str]
    stack: list[tuple[str, tuple[torch.Tensor, ...]]] = field(default_factory=list)
    arguments: dict[str, tuple[object, ...]] = field(default_factory=dict)
    linear: dict[str, tuple[list[torch.Tensor], tuple[str, ...]]] = field(default_factory=dict)
    read_elsewhere: dict[int, tuple[torch.Tensor, set[str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        TorchFunctionMode.__init__(self)
        for name, module in self.model.named_modules():
            module.register_forward_pre_hook(self._enter(name), with_kwargs=True)
            module.register_forward_hook(self._leave)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401 (torch's own signature)
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        output = func(*args, **(kwargs or {}))
        owner = self.stack[-1][0] if self.stack else ""
        linear = bool(matrices_of(self.model.get_submodule(owner)))
        inside = any(name in self.around for name, _ in self.stack)
        if not (linear or inside) and getattr(func, "__name__", "") not in GETTERS:
            handed_on = {id(leaf) for leaf in tree_leaves(output)}  # a cast to what it is already
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor) and id(leaf) not in handed_on:
                    # Held, so that no later tensor gets its identity.
                    self.read_elsewhere.setdefault(id(leaf), (leaf, set()))[1].add(owner)
        return output

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(
            module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
        ) -> None:
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            self.stack.append((name, tuple(tensors)))
            self.arguments[name] = (*args, *kwargs.values())
            if matrices_of(module) or name in self.around:
                # The stack is of the modules around, so the chain is known now, the readers at the
                # end only.
                read = entering(module, args, kwargs)
                self.linear[name] = (read, tuple(self._chain(read[0])))

        return enter

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        self.stack.pop()

    def _chain(self, tensor: torch.Tensor) -> Iterator[str]:
        """The modules, innermost first, that hand on this tensor, below the layer."""
        for name, inputs in reversed(self.stack):
            if name in self.layers or not any(x is tensor for x in inputs):
                return
            yield name

    def entry(self, name: str, around: str) -> str:
        """The outermost module of its chain in `around` in which nothing else reads the tensor.

        Around a region there may be parameters that read something else, as a norm does in front of
        attention to an encoder.
        """
        (tensor, *_), chain = self.linear[name]
        _, readers = self.read_elsewhere.get(id(tensor), (tensor, set()))
        inside = (each for each in chain if f"{each}.".startswith(f"{around}."))
        alone = takewhile(
            lambda each: not any(f"{r}.".startswith(f"{each}.") for r in readers), inside
        )
        return [name, *alone][-1]

    def places(self, regions: Sequence[RegionRule]) -> dict[str, frozenset[int]]:
        """Of each entry the arguments that linear layers read from it; of whole blocks all."""
        places: dict[str, set[int]] = {}
        separate = (region for region in regions if region.block is None)
        pairs = [pair for region in separate for pair in region.entries.items()]
        for name, entry in pairs:
            read = {id(tensor) for tensor in self.linear[name][0]}
            given = (i for i, each in enumerate(self.arguments[entry]) if id(each) in read)
            places.setdefault(entry, set()).update(given)
        return {entry: frozenset(found) for entry, found in places.items() if found}
