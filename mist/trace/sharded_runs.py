"""Runs on shards: what a rank of tensor parallelism computes, confirmed to be the model's own.

What the rules divide is a guess that a run must confirm. Where an operation cannot run on a part of
its tensors, the matrices around it stay whole and the others are divided: a run for each guess.
Modules that need all tokens for what stays whole in them show in the run, too.
"""

import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Final

import sympy
from sympy import Expr
from torch import nn

from mist.model.graph import B, S, T
from mist.trace.diagnose import RAISED, shard_words, without_log
from mist.trace.recording.recorded_part import Part
from mist.trace.recording.recorded_run import Point, RecordedRun
from mist.trace.recording.size_hints import BATCH_HINT
from mist.trace.run_subject import RunSubject
from mist.trace.tensor_parallel.tp_sharding import (
    VOCAB_SIZE,
    Sharding,
    UnsupportedRules,
    path_to,
    with_whole_vocabulary,
)
from mist.trace.tp_graph import find_sharding

PUT_BACK: Final = "aten.slice_backward"
LOG_DIGITS = 3  # of FLOPs that have a logarithm, which equal ones write in many ways


class Undividable(UnsupportedRules):
    """What no shard can run, and the module that runs it."""

    def __init__(self, words: str, module: nn.Module | None) -> None:
        super().__init__(f"{words}; t = 1 only")
        self.words, self.module = words, module


def sharded_run(
    subject: RunSubject, whole: RecordedRun, check: RecordedRun
) -> tuple[RunSubject, RecordedRun]:
    """The run with symbolic shards. Raises Unsupported when it is not the model at t = 1.

    `whole`: a run at concrete sizes in which every parameter is trained; `check`: one of the model
    as it is.
    """
    subject, run = run_on_shards(subject, whole, Point())
    if run.fixed.keys() - {S}:
        raise UnsupportedRules(
            "tensor parallelism cannot be traced (a shard has one size); t = 1 only"
        )
    point = {B: BATCH_HINT, S: subject.seq_hint, T: 1}
    (facts, put_back), (known, known_put_back) = _facts(run, point), _facts(check, point)
    # Where a rank takes its part of a whole table, its gradient is put back in place: such
    # operations are more than the model's own, and nothing else is.
    if facts != known or not known_put_back <= put_back:
        raise UnsupportedRules(
            "the tensor-parallel trace at t = 1 is not the model's own; t = 1 only"
        )
    return subject, run


def run_on_shards(
    subject: RunSubject, whole: RecordedRun, point: Point
) -> tuple[RunSubject, RecordedRun]:
    """A run on shards of all that can be divided, and the subject with the rules that it confirms.

    Raises Unsupported, with the reason, when nothing can.
    """
    left: dict[nn.Module, str] = {}  # modules whose matrices stay whole, and why
    while True:
        sharding = _sharding(subject, whole, left)
        try:
            return _confirmed(replace(subject, sharding=sharding), point)
        except Undividable as fault:
            # Numbers of heads that are smaller in some places, but not in others that nothing
            # knows by name, do not agree: where they are only sizes, all may be the whole model's.
            tables = [each for each in sharding.attributes if each[1] == VOCAB_SIZE]
            literal = replace(sharding, attributes=tables)
            with suppress(Undividable):
                return _confirmed(replace(subject, sharding=literal), point)
            around = _around(fault.module, sharding, subject)
            if not around:
                raise
            left |= dict.fromkeys(around, fault.words)


def _confirmed(subject: RunSubject, point: Point) -> tuple[RunSubject, RecordedRun]:
    """A run of all that a sharding divides. Raises Unsupported where it is not a rank's part."""
    subject, run = _on_shards(subject, point)
    _confirm(run)
    return subject, run


def _sharding(subject: RunSubject, whole: RecordedRun, left: Mapping[nn.Module, str]) -> Sharding:
    """What is divided without the matrices in some modules. Raises Unsupported."""
    model = subject.model
    inside = frozenset(id(inner) for module in left for inner in module.modules())
    try:
        sharding = find_sharding(model.module, whole, inside)
    except UnsupportedRules as reason:
        if not left:
            raise
        # Nothing else is divided: what kept the first from it is the reason.
        raise UnsupportedRules(f"{next(iter(left.values()))}; t = 1 only") from reason
    notes = dict.fromkeys(
        f"{type(module).__name__} stays whole on every tensor-parallel rank: {words}"
        for module, words in left.items()
    )
    sharding = replace(sharding, notes=(*sharding.notes, *notes))
    return sharding if model.loss is None else with_whole_vocabulary(sharding, model.module)


def _around(module: nn.Module | None, sharding: Sharding, subject: RunSubject) -> list[nn.Module]:
    """The innermost module around this one, within a layer, that has divided matrices.

    And those in its place in the layers that are like its own.
    """
    layers = subject.layers
    divided = sharding.divided
    for layer, kind in zip(layers.modules, layers.signatures, strict=True) if layers else ():
        path = [m for m in path_to(module, layer) if any(id(i) in divided for i in m.modules())]
        if path and layers:
            name = next(n for n, inner in layer.named_modules() if inner is path[-1])
            alike = zip(layers.modules, layers.signatures, strict=True)
            return [other.get_submodule(name) for other, own in alike if own == kind]
    return []


def _on_shards(subject: RunSubject, point: Point) -> tuple[RunSubject, RecordedRun]:
    """A run on shards by given rules, and the subject with what it has shown of the model's calls.

    A model that adds a table of its own to the logits has them whole. Raises Unsupported, in our
    words, when the model does not run on shards.
    """
    sharding = subject.sharding
    assert sharding is not None
    try:
        with without_log(RAISED):
            run = subject.session(point)
    except Exception as error:
        words = f"tensor parallelism cannot be traced ({shard_words(error)})"
        raise Undividable(words, _module_of(error)) from error
    layers = subject.layers.modules if subject.layers else ()
    inside = {id(module) for layer in layers for module in layer.modules()}
    outside = (rules for key, rules in run.size_rules.items() if key not in inside)
    if any(rule.operands for rules in outside for rule in rules.values()):
        whole = with_whole_vocabulary(sharding, subject.model.module)
        return _on_shards(replace(subject, sharding=whole), point)
    # A plan names the regions of all layers; what is known of their calls is of those that ran.
    ran = {id(inner) for layer, _ in _layers(run) for inner in layer.modules()}
    regions = tuple(region for region in sharding.regions if region.ends <= ran)
    sharding = replace(
        sharding, size_rules=run.size_rules, fused=run.fused, regions=regions, whole=run.whole
    )
    return replace(subject, sharding=sharding), run


def _module_of(error: BaseException) -> nn.Module | None:
    """The innermost module in whose forward an exception was raised."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    owners = [owner for f in frames if isinstance(owner := f.f_locals.get("self"), nn.Module)]
    return owners[-1] if owners else None


def _confirm(run: RecordedRun) -> None:
    """Raise Undividable for an operation of the layers that is not a rank's part of the model's."""
    for layer, part in _layers(run):
        for mixed in part.mixes():
            words = f"no shard can run {mixed.words}"
            raise Undividable(words, layer.get_submodule(mixed.module))
        for op in part.ops:
            # A rank must do 1/t of the work: else a part of it is divided and a part is not.
            if op.flop.has(T) and sympy.expand(op.flop * T).has(T):
                words = f"{op.name} in {op.module} does not divide by t ({op.flop} FLOPs)"
                raise Undividable(words, layer.get_submodule(op.module))


def _layers(run: RecordedRun) -> Iterator[tuple[nn.Module, Part]]:
    """The layers of a run that are modules, each with its record."""
    return ((piece.module, piece.part) for piece in run.layers if piece.module is not None)


def _facts(run: RecordedRun, point: Mapping[Expr, int]) -> tuple[list[object], Counter[object]]:
    """All costs of a run as numbers; apart from them those of gradients that are put back."""
    values: dict[Expr, Expr] = {}

    def at(expr: Expr) -> Expr:
        if expr not in values:
            value = expr.subs(point)
            values[expr] = round(value, LOG_DIGITS) if value.has(sympy.log) else value
        return values[expr]

    ops = [(o.name, o.phase, at(o.flop), at(o.traffic_bytes)) for o in run.ops()]
    storages = ((k.dtype, at(k.bytes)) for p in run.pieces for k in p.part.storages.values())
    put_back = Counter[object](op for op in ops if op[0] == PUT_BACK)
    others = [op for op in ops if op[0] != PUT_BACK]
    return [*others, *sorted(storages), *(at(p.boundary_bytes) for p in run.pieces)], put_back
