"""Tensor and sequence parallelism of one stage: torch's own styles, entered once per region.

Forward, what enters a region is gathered under sequence parallelism (else it is whole already), and
what leaves it is reduced or reduce-scattered; backward the other way round (Korthikanti et al.
2022). Within a region activations have gradients that are partial sums. So do parameters that are
not divided but see part of the tokens or heads: `partial` names them, and their gradients are
summed over the ranks once per step.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Final, TypeGuard

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from mist.errors import ModelError
from mist.exec.build.shared_norms import share_means
from mist.exec.build.tensor_parts import divide_parts, with_parts
from mist.exec.build.tensor_rules import RegionRule, TensorRules
from mist.exec.build.tensor_sizes import run_with_local_sizes
from mist.exec.build.without_view import without_view

SEQUENCE: Placement = Shard(1)
ROWS: Final = 2  # dimensions of an activation whose tokens are rows
TOKEN_DIMS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkPart:
    """The layers of a chunk by name, whether the ends of the model belong to it, and how it runs.

    `front`, `tail`: names of the parameters that are read before the first layer and behind the
    last one. `micro_batch`: samples. `sp`: sequence parallelism. `split_loss`: logits stay divided
    (within loss_parallel).
    """

    layers: tuple[str, ...]
    first: bool
    last: bool
    front: frozenset[str]
    tail: frozenset[str]
    micro_batch: int
    sp: bool
    split_loss: bool


def divide(
    model: nn.Module, rules: TensorRules, part: ChunkPart, mesh: DeviceMesh
) -> frozenset[str]:
    """Divide a chunk over the ranks of `mesh`, in place.

    Returns the names of parameters whose gradients are partial sums. Raises ModelError when
    sequence parallelism would divide the tokens that attention counts, or would leave a gradient
    that is a partial sum in part.
    """
    inside, whole = _divide_layers(model, rules, part, mesh)
    _divide_ends(model, rules, part, mesh)
    head_partial = part.sp and rules.head is not None
    if part.sp:
        _shard_sequence(model, part, mesh, head_partial=head_partial)
    partial_names = frozenset(
        name
        for name in _partial(model, part, inside, head_partial=head_partial)
        if not name.startswith(tuple(f"{module}." for module in whole))
    )
    if mixed := sorted(partial_names & part.front) if part.first else []:
        raise ModelError(
            f"sp: {mixed[0]} is read before the layers, by all tokens on every rank, and behind "
            "them, by the tokens of a rank; its gradient cannot be summed. Plan without sp."
        )
    return partial_names


def _divide_layers(
    model: nn.Module, rules: TensorRules, part: ChunkPart, mesh: DeviceMesh
) -> tuple[set[str], set[str]]:
    """Divide the layers; the modules that are inside regions, and those that gather tokens."""
    prefixes = tuple(f"{name}." for name in part.layers)
    _divide_parameters(model, rules, prefixes, mesh)
    regions = [region for region in rules.regions if region.is_in(*part.layers)]
    for region in regions:
        _divide_region(model, region, mesh, part, rules.parts)
    for name in rules.norms:
        if name.startswith(prefixes):
            share_means(model.get_submodule(name), mesh)
    entries = _enter_regions(model, rules, regions, mesh, part)
    exits = {name for region in regions for name in region.ends}
    whole = {name for name in rules.whole if part.sp and name.startswith(prefixes)}
    options: Any = {"mesh": mesh, "batch": part.micro_batch}
    _on_all(model, exits, _on_exit, partial(_leave if part.sp else _add_up, **options))
    _on_all(model, whole, _on_entry, partial(_gather, **options))
    _on_all(model, whole, _on_exit, partial(_scatter_output, **options))
    # Last, so that calls which the hooks above make are not counted as the model's.
    for name, sizes in rules.sizes.items():
        if f"{name}.".startswith(prefixes):
            run_with_local_sizes(model.get_submodule(name), sizes, mesh)
    # What lies behind a row in a module that ends its region reads a part of a sum.
    inside = entries | exits.difference(*(region.rows for region in regions))
    return inside, whole


def _enter_regions(
    model: nn.Module,
    rules: TensorRules,
    regions: Sequence[RegionRule],
    mesh: DeviceMesh,
    part: ChunkPart,
) -> set[str]:
    """Have activations enter regions; the modules at which they do."""
    entries: set[str] = set()
    for layer in part.layers:
        here = [region for region in regions if region.is_in(layer)]
        names = {name for region in here for name in region.entries.values()}
        enter = partial(_enter, mesh=mesh, sp=part.sp, batch=part.micro_batch)
        once = _Once(enter)
        # Modules that are one region of several matrices, experts and their routing, enter alone.
        alone = {region.block for region in here}
        for name in sorted(names):
            cross = enter if name in alone else once
            _on_entry(model.get_submodule(name), cross, rules.places.get(name))
        model.get_submodule(layer).register_forward_hook(once.forget, always_call=True)
        entries |= names
    return entries


def _divide_parameters(
    model: nn.Module, rules: TensorRules, prefixes: tuple[str, ...], mesh: DeviceMesh
) -> None:
    """Numbers that are smaller on a rank, and parameters that torch's styles do not know."""
    modules = dict(model.named_modules())
    for (owner, attribute), value in rules.local.items():
        if owner in modules:  # those of layers of other stages are not here
            *path, name = attribute.split(".")
            # Past what checks an assignment: others of a configuration's numbers do not change.
            vars(reduce(getattr, path, modules[owner]))[name] = value
    for name, parts in rules.parts.items():
        if name.startswith(prefixes):
            divide_parts(modules[name], parts, mesh)


def _on_all(model: nn.Module, names: set[str], hook: Callable[..., None], cross: Any) -> None:  # noqa: ANN401 (a partial of ours)
    for name in sorted(names):
        hook(model.get_submodule(name), cross)


def _divide_region(
    model: nn.Module,
    region: RegionRule,
    mesh: DeviceMesh,
    part: ChunkPart,
    parts: Mapping[str, object],
) -> None:
    sp = part.sp
    if sp and region.attends and set(region.columns) & set(region.entries.values()):
        raise ModelError(
            f"sp: attention around {region.rows[0]} is not in a module of its own that is given "
            "the activation, so its tokens cannot be gathered for it. Plan without sp."
        )
    for name in region.columns:
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear) and name not in parts:
            parallelize_module(module, mesh, ColwiseParallel())
            _partial_input(module, mesh)
    for name in region.rows:
        row = model.get_submodule(name)
        if isinstance(row, nn.Linear) and name not in parts:
            # The sum stays open here: it is added up or scattered once, where the region ends.
            parallelize_module(row, mesh, RowwiseParallel(output_layouts=Partial()))


def _divide_ends(model: nn.Module, rules: TensorRules, part: ChunkPart, mesh: DeviceMesh) -> None:
    """Embedding and head by vocabulary, where they belong to the chunk; tied ones stay tied."""
    table = rules.embedding if part.first else None
    head = rules.head if part.last else None
    both = table is not None and head is not None
    tied = both and _weight(model, table) is _weight(model, head)
    if table is not None:
        # An encoder and a decoder may each have a table, of one weight.
        tables = _with_weight(model, _weight(model, table))
        for name in tables:
            _divide_table(model, name, mesh, direct=part.sp and rules.direct)
            model.get_submodule(name).weight = _weight(model, tables[0])
    if head is not None:
        _divide_head(model, head, part, mesh)
    if tied:
        # Divided apart they would be two DTensors, which are trained apart.
        model.get_submodule(str(head)).weight = _weight(model, table)


def _with_weight(model: nn.Module, weight: nn.Parameter) -> list[str]:
    """The tables that look up in a weight."""
    modules = model.named_modules()
    return [n for n, m in modules if isinstance(m, nn.Embedding) and m.weight is weight]


def _weight(model: nn.Module, name: str | None) -> nn.Parameter:
    weight = model.get_submodule(str(name)).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _divide_table(model: nn.Module, name: str, mesh: DeviceMesh, *, direct: bool) -> None:
    """Each rank looks up its own rows of the vocabulary.

    DTensor's lookup has the gradient of the whole table on every rank, and adds those up. `direct`:
    the first layer takes its shards right out of the result.
    """
    table = model.get_submodule(name)
    assert isinstance(table, nn.Embedding)
    if table.max_norm is not None or table.scale_grad_by_freq or table.sparse:
        raise ModelError(
            f"tp: {name} has max_norm, scale_grad_by_freq or sparse gradients, which a part of its "
            "rows cannot have. Use tp 1."
        )
    # Without a source rank nothing is sent: every rank has the parameter, on the meta device.
    weight = distribute_tensor(table.weight, mesh, (Shard(0),), src_data_rank=None)
    table.weight = nn.Parameter(weight, table.weight.requires_grad)
    num_rows = table.num_embeddings // mesh.size()
    if table.padding_idx is not None:  # a row that gets no gradient: one rank has it
        place = table.padding_idx - mesh.get_local_rank() * num_rows
        table.padding_idx = place if 0 <= place < num_rows else None
    look_up = partial(_look_up, table, table.forward, mesh, direct=direct)
    table.forward = look_up  # type: ignore[method-assign]


def _look_up(
    table: nn.Embedding,
    forward: Callable[[torch.Tensor], torch.Tensor],
    mesh: DeviceMesh,
    ids: torch.Tensor,
    *,
    direct: bool,
) -> torch.Tensor:
    """Embeddings by the table's own forward (which may scale them) on this rank's rows."""
    weight = table.weight
    assert isinstance(weight, DTensor)
    # The gradient of these rows is a shard already, not a part of a sum.
    rows = weight.to_local(grad_placements=(Shard(0),))
    places = ids - mesh.get_local_rank() * rows.shape[0]
    outside = (places < 0) | (places >= rows.shape[0])
    embeddings = with_parts(table, forward, {"weight": rows}, places.masked_fill(outside, 0))
    embeddings = embeddings.masked_fill(outside.unsqueeze(-1), 0)
    sums = DTensor.from_local(embeddings, mesh, (Partial(),), run_check=False)
    if direct:
        return sums.redistribute(placements=(SEQUENCE,))
    return sums.redistribute(placements=(Replicate(),)).to_local()


def _divide_head(model: nn.Module, name: str, part: ChunkPart, mesh: DeviceMesh) -> None:
    logits = Shard(-1) if part.split_loss else Replicate()
    style = ColwiseParallel(output_layouts=logits, use_local_output=not part.split_loss)
    parallelize_module(model, mesh, {name: style})
    if part.sp:
        _partial_input(model.get_submodule(name), mesh)


def _shard_sequence(
    model: nn.Module, part: ChunkPart, mesh: DeviceMesh, *, head_partial: bool
) -> None:
    """Tokens are divided from the first layer of the model to the last one."""
    if part.first:
        _on_entry(model.get_submodule(part.layers[0]), partial(_scatter, mesh=mesh))
    if part.last:
        # A divided head gives each rank a part of the gradient, another one gives all of it to
        # each.
        grads = (Partial(),) if head_partial else None
        gather = partial(_whole, mesh=mesh, grads=grads)
        _on_exit(model.get_submodule(part.layers[-1]), gather)


def _whole(
    shard: torch.Tensor, mesh: DeviceMesh, grads: tuple[Placement, ...] | None
) -> torch.Tensor:
    """All tokens of an activation whose tokens are divided."""
    shards = DTensor.from_local(shard, mesh, (SEQUENCE,), run_check=False)
    return shards.redistribute(placements=(Replicate(),)).to_local(grad_placements=grads)


def _scatter(whole: torch.Tensor, *, mesh: DeviceMesh) -> torch.Tensor:
    """This rank's tokens of an activation that every rank has, or has its shard of already."""
    if isinstance(whole, DTensor):
        return whole.to_local()
    copies = DTensor.from_local(whole, mesh, (Replicate(),), run_check=False)
    return copies.redistribute(placements=(SEQUENCE,)).to_local()


def _enter(x: torch.Tensor, *, mesh: DeviceMesh, sp: bool, batch: int) -> torch.Tensor:
    """What enters a region: whole, with a gradient that is summed over the ranks."""
    if sp:
        whole = _whole(_by_sample(x, batch), mesh, (Partial(),))
        return whole.flatten(0, 1) if x.dim() == ROWS else whole
    copies = DTensor.from_local(x, mesh, (Replicate(),), run_check=False)
    # As each rank computes a part of the gradient, its backward adds them up: the one all-reduce of
    # the entry.
    return copies.to_local(grad_placements=(Partial(),))


class _Once:
    """What several modules of a layer are given enters once, with one gradient to add up."""

    def __init__(self, enter: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._enter = enter
        # With what entered, so that no other tensor gets its identity.
        self._entered: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if id(x) not in self._entered:
            self._entered[id(x)] = x, self._enter(x)
        return self._entered[id(x)][1]

    def forget(self, module: nn.Module, args: object, output: object) -> None:
        """The layer has run."""
        self._entered.clear()


def _leave(output: torch.Tensor, *, mesh: DeviceMesh, batch: int) -> torch.Tensor:
    """What leaves a region: the sum over the ranks, of which each takes its tokens."""
    parts = DTensor.from_local(_by_sample(output, batch), mesh, (Partial(),), run_check=False)
    shard = parts.redistribute(placements=(SEQUENCE,)).to_local()
    return shard.flatten(0, 1) if output.dim() == ROWS else shard


def _add_up(output: torch.Tensor, *, mesh: DeviceMesh, batch: int) -> torch.Tensor:
    """What leaves a region without sequence parallelism: the sum over the ranks, on every rank."""
    parts = DTensor.from_local(output, mesh, (Partial(),), run_check=False)
    return parts.redistribute(placements=(Replicate(),)).to_local()


def _gather(x: torch.Tensor, *, mesh: DeviceMesh, batch: int) -> torch.Tensor:
    """What enters a module that needs all tokens, which every rank computes alike."""
    whole = _whole(_by_sample(x, batch), mesh, None)
    return whole.flatten(0, 1) if x.dim() == ROWS else whole


def _scatter_output(output: torch.Tensor, *, mesh: DeviceMesh, batch: int) -> torch.Tensor:
    """This rank's tokens of the output of such a module."""
    shard = _scatter(_by_sample(output, batch), mesh=mesh)
    return shard.flatten(0, 1) if output.dim() == ROWS else shard


def _by_sample(x: torch.Tensor, batch: int) -> torch.Tensor:
    """[batch, tokens, width], also of a layer that has all tokens as rows."""
    return x.unflatten(0, (batch, -1)) if x.dim() == ROWS else x


def _partial_input(module: nn.Module, mesh: DeviceMesh) -> None:
    """The input of a column-parallel matrix was entered before: its gradient stays partial."""

    def mark_partial(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, *others = args
        entered = DTensor.from_local(
            x, mesh, (Replicate(),), run_check=False, grad_placements=(Partial(),)
        )
        return (entered, *others)

    module.register_forward_pre_hook(mark_partial, prepend=True)


def _on_entry(
    module: nn.Module,
    enter: Any,  # noqa: ANN401 (a partial of ours)
    places: frozenset[int] | None = None,
) -> None:
    """Apply `enter` to the activation that a module is given: its tensors with a gradient.

    Where nothing up to here is trained none has one: then it is the first tensor of floats.
    `places`: of the arguments, keywords behind positions, only these.
    """

    def on_input(
        module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        values = enumerate((*args, *kwargs.values()))
        floats = [x for i, x in values if _is_activation(x) and (places is None or i in places)]
        activations = [x for x in floats if x.requires_grad] or floats[:1]
        # A tensor that is given twice stays one: attention to itself knows itself by that.
        entered = {id(x): enter(x) for x in {id(x): x for x in activations}.values()}
        new_kwargs = {n: entered.get(id(x), x) for n, x in kwargs.items()}
        return tuple(entered.get(id(x), x) for x in args), new_kwargs

    module.register_forward_pre_hook(on_input, prepend=True, with_kwargs=True)


def _on_exit(module: nn.Module, leave: Any) -> None:  # noqa: ANN401 (a partial of ours)
    """Apply `leave` to the activation that a module gives: the first tensor of what it returns.

    A model may add to the result in place, as Falcon does.
    """

    def on_output(module: nn.Module, args: object, output: Any) -> object:  # noqa: ANN401
        if isinstance(output, torch.Tensor):
            return without_view(leave(output))
        return (without_view(leave(output[0])), *output[1:])

    module.register_forward_hook(on_output)


def _is_activation(value: object) -> TypeGuard[torch.Tensor]:
    """[batch, tokens, width] or rows of it: biases of scores, by head, are summed elsewhere."""
    if not isinstance(value, torch.Tensor):
        return False
    return value.is_floating_point() and value.dim() <= TOKEN_DIMS


def _partial(
    model: nn.Module, part: ChunkPart, inside: set[str], *, head_partial: bool
) -> Iterator[str]:
    layers = tuple(f"{name}." for name in part.layers)
    regions = tuple(f"{name}." for name in inside)
    for name, parameter in model.named_parameters():
        in_tail = head_partial and part.last and name in part.tail
        in_layers = name.startswith(layers if part.sp else regions)
        if not isinstance(parameter, DTensor) and (in_layers or in_tail):
            yield name
