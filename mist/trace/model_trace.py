"""From a loaded model to its ModelGraph: the runs of `runs`, assembled into blocks."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

from sympy import Integer
from torch import fx, nn

from mist.errors import InputError, TraceError
from mist.layers import defer_logits, layer_form
from mist.layers.own_checkpoints import own_checkpoints, switched_off
from mist.model.graph import Block, ModelGraph, Param
from mist.model.summary import LayerRun, ModelLimits
from mist.plans.workload import HeadMode, MemoryLevel
from mist.trace.crossings import crossings, other_entries_back
from mist.trace.models.loader import LoadedModel
from mist.trace.models.source import TraceSetting
from mist.trace.ownership import Owned, owned_parts, unread_note
from mist.trace.recording.recorded_run import Piece, RecordedRun
from mist.trace.recording.session import Forms
from mist.trace.recording.size_hints import seq_hint
from mist.trace.repeated_blocks import Layers, find_layers
from mist.trace.run_subject import OneLength
from mist.trace.runs import (
    OWN_CHECKPOINTS,
    Progress,
    Recorded,
    record_forms,
    record_model,
    traced_layers,
)
from mist.trace.sequence_loops import SequenceLoop
from mist.trace.simplify import simplify_graph
from mist.trace.tensor_parallel.tp_apply import undivided, whole_sequence
from mist.trace.tensor_parallel.tp_plan import planned_heads
from mist.trace.tensor_parallel.tp_sharding import Sharding

UNSTAGED: Final = (
    "mist apply has one pipeline stage for the layers, and leaves the sequence whole: {}"
)
TEXT_ONLY: Final = (
    "planned for texts without images (--images 0), as what looks at images cannot be traced: {}"
)
WHOLE_SEQUENCE: Final = "mist apply leaves the sequence whole under tensor parallelism: {}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """A model graph and the torch.fx graph of each of its parts, by block name.

    `seq_len`: the length that decided its branches, None for the usual one. `layers`: the modules
    that were taken for its layers.
    """

    graph: ModelGraph
    fx: Mapping[str, fx.Graph]
    seq_len: int | None
    layers: Layers | None


def limits_of(model: LoadedModel) -> ModelLimits:
    """What a model says of itself before it is traced."""
    return ModelLimits(
        name=model.name,
        num_trainable=sum(p.numel() for p in model.module.parameters() if p.requires_grad),
        max_seq_len=model.max_seq_len,
        tp_limits=tuple(planned_heads(model.module)),
    )


def trace_levels(  # noqa: PLR0913 - a model, what is known of it, what it is traced for
    model: LoadedModel,
    plain: ModelGraph,
    setting: TraceSetting,
    levels: Sequence[MemoryLevel],
    *,
    progress: Progress,
    layers: Layers | None = None,
) -> dict[MemoryLevel, Traced]:
    """A traced model at levels that convert its layers: its graph with the blocks they become.

    `plain`: the model as it is; `layers`: its layers, where they are known. Undivided (t = 1), as
    converted layers run. Levels that the model cannot have are left out, and `progress` hears why.
    """
    if plain.images is not None:
        model = replace(model, images=plain.images)
    forms: dict[MemoryLevel, Forms] = {}
    if layers is None:
        with switched_off(model.module):
            layers = traced_layers(model, setting)
    for level in levels:
        try:
            forms[level] = _forms(model, layers, level)
        except InputError as fault:
            progress(f"{model.name} has no level {level}: {fault}")
    if not forms or layers is None:
        return {}
    progress(f"tracing {' and '.join(forms)}")
    try:
        traced = _traced_forms(model, plain, setting, layers, [*forms.values()])
    except TraceError as fault:
        if len(forms) > 1:  # one by one: a level takes no other along
            each = [
                trace_levels(model, plain, setting, [at], progress=progress, layers=layers)
                for at in forms
            ]
            return {level: traced for alone in each for level, traced in alone.items()}
        progress(f"{model.name} has no level {next(iter(forms))}: {fault}")
        return {}
    return dict(zip(forms, traced, strict=True))


def _traced_forms(
    model: LoadedModel,
    plain: ModelGraph,
    setting: TraceSetting,
    layers: Layers,
    forms: Sequence[Forms],
) -> list[Traced]:
    """A model with its layers in each of these forms. Raises TraceError."""

    def record(setting: TraceSetting) -> list[Traced]:
        result = record_forms(model, setting, layers, forms)
        kinds = [kind // len(forms) for kind in result.run.kinds]
        if (_runs(kinds), len(result.single.layers)) != (plain.layers, len(result.run.layers)):
            raise TraceError(f"the layers of {model.name} differ when they are converted.")
        return [
            _in_form(model, setting, plain, result, slice(i, None, len(forms)))
            for i in range(len(forms))
        ]

    with _training(model.module):
        return _in_regime(model, setting, record, lambda message: None)


def _forms(model: LoadedModel, layers: Layers | None, level: MemoryLevel) -> Forms:
    """What a level makes of each kind of layer, as `mist apply` does; what is around them stays.

    Raises InputError where there are no layers, or nothing in one of them is recognised.
    """
    if layers is None:
        raise InputError(f"level {level}: {model.name} has no list of layers.")
    first = dict(zip(reversed(layers.signatures), reversed(layers.modules), strict=True))
    return {known: layer_form(layer, level) for known, layer in first.items()}


def _in_form(
    model: LoadedModel, setting: TraceSetting, plain: ModelGraph, result: Recorded, own: slice
) -> Traced:
    """The graph with the pieces of one form as its blocks."""
    pieces = result.run.layers[own]
    nothing = Owned(params=(), buffer_bytes=0)
    blocks = tuple(
        replace(
            _block(piece, one, nothing, None, result.run),
            params=block.params,
            buffer_bytes=block.buffer_bytes,
        )
        for piece, one, block in zip(pieces, result.single.layers[own], plain.blocks, strict=True)
    )
    graph = simplify_graph(replace(plain, blocks=blocks), seq_hint(model, setting.seq_len))
    return Traced(graph=graph, fx=_graphs(pieces), seq_len=setting.seq_len, layers=result.layers)


def _graphs(pieces: Iterable[Piece]) -> dict[str, fx.Graph]:
    return {f"{i}:{piece.part.name}": piece.part.graph for i, piece in enumerate(pieces)}


def trace_with_head(
    model: LoadedModel, mode: HeadMode, setting: TraceSetting, progress: Progress
) -> Traced:
    """Trace a loaded model whose head runs in a mode, as `mist apply` runs it; it is changed.

    Raises InputError where its loss is not what such a head computes, TraceError as `trace`.
    """
    layers = find_layers(model.module)
    head = defer_logits(model.module, layers.modules if layers else (), mode)
    try:
        traced = trace(model, setting, progress)
    except TraceError as fault:
        if not model.images or setting.images is not None:
            raise
        progress(f"{model.name} cannot be traced with images")
        text = replace(model, images=0, notes=(*model.notes, TEXT_ONLY.format(fault)))
        traced = trace(text, setting, progress)
    if head is not None:
        head.refuse_unused(model.name)
    return traced


def listing(traced: Traced) -> str:
    """The operations of every part, one a line: for readers, not for programs."""
    lines = []
    for name, graph in traced.fx.items():
        lines.append(f"# {name}")
        for node in graph.nodes:
            if node.op == "call_function":
                meta = node.meta
                shape = ", ".join(map(str, meta["shape"]))
                lines.append(
                    f"{node.name} = {node.target}({', '.join(map(str, node.all_input_nodes))}) "
                    f"-> {meta['dtype']}[{shape}] flop={meta['flop']} bytes={meta['bytes']} "
                    f"phase={meta['phase']} module={meta['module']}"
                )
    return "\n".join(lines) + "\n"


def trace(model: LoadedModel, setting: TraceSetting, progress: Progress) -> Traced:
    """Trace a loaded model as it trains. Raises TraceError, naming the line at fault."""
    _refuse_frozen(model)
    if own_checkpoints(model.module):
        model = replace(model, notes=(*model.notes, OWN_CHECKPOINTS))

    def record(setting: TraceSetting) -> list[Traced]:
        return [_assemble(model, setting, record_model(model, setting, progress))]

    with _training(model.module):
        (traced,) = _in_regime(model, setting, record, progress)
    return traced


def _in_regime(
    model: LoadedModel,
    setting: TraceSetting,
    record: Callable[[TraceSetting], list[Traced]],
    progress: Progress,
) -> list[Traced]:
    """The usual traces, or those at the length that is asked for where a usual does not hold.

    What is traced at that length first is the usual trace where it holds at the usual length.
    """
    asked = _asked_first(model, setting, record)
    if asked and any(not each.graph.lengths.is_one for each in asked):
        return asked
    usual, length = _usual(model, setting, record), seq_hint(model, setting.seq_len)
    if usual and (setting.seq_len is None or _hold(usual, length)):
        return usual
    if asked:
        return asked
    progress(f"{model.name} runs otherwise at {length} tokens")
    # Of use although it may hold there only: another length is traced when it is asked for.
    return record(replace(setting, seq_len=length))


def _usual(
    model: LoadedModel,
    setting: TraceSetting,
    record: Callable[[TraceSetting], list[Traced]],
) -> list[Traced] | None:
    """The usual traces; None where the model has one length, or runs at the one asked for only."""
    try:
        return record(replace(setting, seq_len=None))
    except OneLength:
        return None
    except TraceError as fault:
        at_any = isinstance(fault, SequenceLoop)
        asks_usual = seq_hint(model, setting.seq_len) == seq_hint(model, None)
        if at_any or asks_usual or setting.seq_len is None:
            raise
        return None


def _asked_first(
    model: LoadedModel,
    setting: TraceSetting,
    record: Callable[[TraceSetting], list[Traced]],
) -> list[Traced] | None:
    """The traces at the length that is asked for, where they say the most; None where it fails.

    At the model's own limit a table is read whole, which holds at no other length; what a compiled
    graph keeps is decided by the length, and so at the usual one.
    """
    length, usual_length = seq_hint(model, setting.seq_len), seq_hint(model, None)
    if setting.compiled or length in (usual_length, model.max_seq_len):
        return None
    try:
        asked = record(setting)
    except TraceError as fault:
        if isinstance(fault, SequenceLoop):  # so does any length
            raise
        return None
    return [replace(each, seq_len=None) for each in asked] if _hold(asked, usual_length) else asked


def _hold(traced: Iterable[Traced], length: int) -> bool:
    return all(length in each.graph.lengths for each in traced)


def _refuse_frozen(model: LoadedModel) -> None:
    """Raise TraceError when a model has parameters but trains none."""
    parameters = list(model.module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        count = sum(parameter.numel() for parameter in parameters)
        raise TraceError(
            f"{model.name} has nothing to train: all of its {count:,} parameters have "
            "requires_grad=False. Set requires_grad=True on those that should change."
        )


@contextmanager
def _training(module: nn.Module) -> Iterator[None]:
    # A file may build its model in eval mode, in which dropout keeps no masks.
    modes = [(each, each.training) for each in module.modules()]
    module.train()
    try:
        with switched_off(module):
            yield
    finally:
        for each, mode in modes:
            each.training = mode


def _assemble(model: LoadedModel, setting: TraceSetting, result: Recorded) -> Traced:
    run, single, sharding = result.run, result.single, result.sharding
    owners = owned_parts(model.module, result)
    pieces = (run.embed, run.head, *run.layers)
    singles = (single.embed, single.head, *single.layers)
    blocks = [
        _block(piece, one, owned, sharding, run)
        for piece, one, owned in zip(pieces, singles, owners, strict=True)
    ]
    embed, head, *layers = blocks
    # The ends exchange the activation of the layer next to them, not what that layer carries.
    if layers:
        embed = replace(embed, tp_bytes=layers[run.kinds[0]].boundary_bytes)
        head = replace(head, tp_bytes=layers[run.kinds[-1]].boundary_bytes)
    if result.layers is None:
        whole = replace(head, name=type(model.module).__name__)
        embed, head, layers = _empty("embed"), _empty("head"), [whole]
    hint = seq_hint(model, setting.seq_len)
    graph = simplify_graph(_graph(model, setting, result, (embed, head, *layers)), hint)
    return Traced(graph=graph, fx=_graphs(pieces), seq_len=setting.seq_len, layers=result.layers)


def _graph(
    model: LoadedModel, setting: TraceSetting, result: Recorded, blocks: tuple[Block, ...]
) -> ModelGraph:
    embed, head, *layers = blocks
    tied = any(param.tied for block in blocks for param in block.params)
    runs = _runs(result.run.kinds) or (LayerRun(block=0, count=1),)
    whole = _whole_sequence(model.module, result)
    return ModelGraph(
        name=model.name,
        num_params=sum(p.numel() for p in model.module.parameters()),
        num_trainable=sum(p.numel() for p in model.module.parameters() if p.requires_grad),
        blocks=tuple(layers),
        layers=runs,
        embed=embed,
        head=head,
        shared=result.run.shared,
        shared_single=result.single.shared,
        tied=tied,
        max_seq_len=model.max_seq_len,
        tp_limits=result.sharding.limits if result.sharding else None,
        undivided=_undivided(model.module, result),
        sequential=result.run.sequential,
        unstaged=result.run.unstaged,
        whole_sequence=whole,
        calls_again=len(set(result.run.order)) < len(result.run.order),
        images=model.images if model.takes_images else None,
        image_tokens=model.image_tokens,
        precision=setting.precision.value,
        fingerprint=_fingerprint(model.module, runs, tied),
        notes=(*result.notes, *_apply_notes(result, whole), *unread_note(model.module, result)),
    )


def _undivided(model: nn.Module, result: Recorded) -> str | None:
    """Why `mist apply` cannot divide a model whose shares are known."""
    if result.sharding is None:
        return None
    refusals = (words for piece in result.run.layers for words in piece.part.refusals)
    return undivided(model, result.sharding) or next(refusals, None)


def _whole_sequence(model: nn.Module, result: Recorded) -> str | None:
    """Why `mist apply` leaves the sequence whole under tensor parallelism."""
    if result.sharding is None or result.run.unstaged is not None:
        return result.run.unstaged
    exposed = set[int]().union(*(piece.part.exposed for piece in result.run.layers))
    return whole_sequence(model, result.sharding, exposed)


def _apply_notes(result: Recorded, whole: str | None) -> Iterator[str]:
    """What `mist apply` does not divide of a model."""
    if result.run.sequential and result.run.unstaged is not None:
        yield UNSTAGED.format(result.run.unstaged)
    elif result.sharding is not None and whole is not None:
        yield WHOLE_SEQUENCE.format(whole)


def _runs(kinds: Iterable[int]) -> tuple[LayerRun, ...]:
    runs: list[LayerRun] = []
    for kind in kinds:
        last = runs.pop() if runs and runs[-1].block == kind else LayerRun(block=kind, count=0)
        runs.append(LayerRun(block=kind, count=last.count + 1))
    return tuple(runs)


def _fingerprint(module: nn.Module, runs: Iterable[LayerRun], tied: bool) -> str:
    parameters = list(module.named_parameters())
    shapes = sorted((name, list(p.shape)) for name, p in parameters)
    frozen = sorted(name for name, p in parameters if not p.requires_grad)
    facts = [shapes, [[run.block, run.count] for run in runs], tied]
    # Models without frozen parameters keep the fingerprints of existing plan files.
    text = json.dumps([*facts, frozen] if frozen else facts)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _block(
    piece: Piece, single: Piece, owned: Owned, sharding: Sharding | None, run: RecordedRun
) -> Block:
    shares = sharding.params if sharding else {}
    block_params = tuple(
        Param(
            name=name,
            numel=tensor.numel(),
            num_reals=tensor.numel() * (2 if tensor.is_complex() else 1),
            sharded=id(tensor) in shares,
            tied=tied,
            trainable=tensor.requires_grad,
        )
        for name, tensor, tied in owned.params
    )
    return Block(
        name=piece.part.name,
        params=block_params,
        buffer_bytes=owned.buffer_bytes,
        ops=tuple(piece.part.ops),
        saved=piece.part.saved(),
        saved_single=single.part.saved(),
        early=piece.part.early(),
        awaited=tuple(piece.part.awaited.gradients),
        keeps_input=piece.part.keeps_input,
        boundary_bytes=piece.boundary_bytes,
        carried_bytes=piece.carried_bytes,
        flows=piece.flows,
        tp_bytes=piece.boundary_bytes,
        transient_bytes=piece.transients,
        transient_with_grads_bytes=piece.transients_with_grads,
        transient_adding_bytes=piece.transients_adding,
        made_bytes=piece.part.live.made_bytes() if piece.transients else (),
        forward_bytes=run.forward_bytes(piece),
        **crossings(piece, block_params, sharding, run),
        other_entries_back=other_entries_back(piece, sharding, run),
        norm_sums=tuple(size for size, _ in piece.part.norm_sums),
        norm_sums_back=tuple(size for size, flows in piece.part.norm_sums if flows),
        num_recomputed_ops=piece.part.num_recomputed_ops,
        domain=run.domain,
    )


def _empty(name: str) -> Block:
    return Block(
        name=name,
        params=(),
        buffer_bytes=0,
        ops=(),
        saved=(),
        saved_single=(),
        early=(),
        awaited=(),
        keeps_input=True,
        boundary_bytes=Integer(0),
        carried_bytes=Integer(0),
        flows=False,
        tp_bytes=Integer(0),
        transient_bytes=(),
        transient_with_grads_bytes=(),
        transient_adding_bytes=(),
        made_bytes=(),
        forward_bytes=(),
        num_entries=0,
        num_exits=0,
        num_entries_back=0,
        num_exits_back=0,
        other_entries_back=(),
        norm_sums=(),
        norm_sums_back=(),
        num_whole=0,
        num_recomputed_ops=0,
        domain=(),
    )
