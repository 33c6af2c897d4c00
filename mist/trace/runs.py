"""The runs that a model is recorded in, and what they must agree on.

Three runs: one at concrete sizes, which finds the layers that are called once each; the symbolic
one that gives the expressions (b >= 2, shapes sharded by t where rules are known), which must agree
with the first at t = 1; and one at b = 1, forward only, since a dimension of size 1 changes which
tensors autograd keeps. Where symbolic sizes fail, expressions come from more runs at concrete ones.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from torch import nn

from mist.errors import TraceError
from mist.model.graph import S
from mist.trace.models.loader import LoadedModel
from mist.trace.models.source import TraceSetting
from mist.trace.operations.message_passing import passes_messages
from mist.trace.operations.scan_kernels import SCAN_OPS
from mist.trace.polynomial_fit import NotPolynomial, fitted_run, run_of_one_length
from mist.trace.recording.op_limit import LimitReached, OpLimit
from mist.trace.recording.recorded_run import NotALayerList, Point, RecordedRun
from mist.trace.recording.session import Forms
from mist.trace.recording.size_hints import BATCH_HINT, SEQ_HINT, seq_hint
from mist.trace.repeated_blocks import Layers, called_again, find_layers
from mist.trace.run_subject import RunSubject
from mist.trace.sequence_loops import refuse_loops
from mist.trace.sharded_runs import run_on_shards, sharded_run
from mist.trace.tensor_parallel.tp_sharding import Sharding, UnsupportedRules

Progress = Callable[[str], None]

NO_LAYERS = "no list of layers that are called once each in order: one block, one layer"
ROUTED = "mixture of experts: even routing is assumed, and every rank holds all experts (ep = 1)"
ONE_SIZE = "a sample has a fixed size: the sequence length changes no cost, only the tokens counted"
NOT_SYMBOLIC = (
    "symbolic sizes cannot be traced: costs are polynomials through runs at concrete sizes, "
    "exact at held-out ones, and hold up to the largest of them; t = 1 only"
)
OUT_OF_LINE = (
    "layers exchange tensors with layers that are not their neighbours (skip connections): "
    "one pipeline stage only"
)
SHARED = (
    "layers are called again with the same parameters, which one pipeline stage must have: "
    "counted once, run each time"
)
OWN_CHECKPOINTS = (
    "the model's own checkpoints (torch.utils.checkpoint) are undone: a plan decides which layers "
    "recompute"
)
WINDOWED = (
    "sliding windows run in a kernel that skips what lies outside of them (FlashAttention 2, "
    "FlexAttention); torch's own attention takes them as a mask over all pairs and needs more"
)
SCANS = (
    "scans over the sequence are priced as the kernels of flash-linear-attention and mamba_ssm, "
    "which transformers takes where they are installed; its references in Python need far more"
)
RECURRENCES = (
    "recurrent layers are priced as cuDNN's kernels, token after token; what these keep is not "
    "documented, and taken as the gates and cell states that the backward pass needs"
)
GRAPHS = (
    "edges of a graph are as many as make_batch gives for its nodes; none of them is taken for a "
    "loop, which layers would drop"
)
COMPILED: Final = (
    "torch.compile: layers only; which tensors are kept is decided at b = "
    f"{BATCH_HINT}, s = {SEQ_HINT} (shorter where the model is)"
)

# Forward operations of one part: several times a layer's. A loop runs one or more for each token.
LONG_OPS: Final = SEQ_HINT


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A model's runs: symbolic and at b = 1; its layers and its tensor-parallel rules, if any."""

    layers: Layers | None
    run: RecordedRun
    single: RecordedRun
    sharding: Sharding | None
    notes: tuple[str, ...]


def record_model(model: LoadedModel, setting: TraceSetting, progress: Progress) -> Recorded:
    """Run a model as often as its costs need. Raises TraceError."""
    progress("tracing at concrete sizes")
    # A compiled graph hides modules: layers and regions are those of the eager run.
    eager = replace(setting, compiled=False)
    subject, check = _first_run(RunSubject(model=model, setting=eager))
    whole = _trained_whole(subject, check)
    progress("tracing symbolic sizes")
    try:
        subject, run = sharded_run(subject, whole, check)
        notes = list(subject.notes)
    except UnsupportedRules as reason:
        subject = replace(subject, sharding=None)
        run, is_fitted = _expressions(subject, batch=None)
        notes = [NOT_SYMBOLIC if is_fitted else str(reason)]
    if setting.compiled:
        progress("tracing as compiled")
        subject = replace(subject, setting=setting)
        run, notes = _compiled_run(subject, run), [*notes, COMPILED]
    progress("tracing b = 1")
    single, _ = _expressions(subject, batch=1)
    run = replace(run, sequential=whole.sequential, unstaged=whole.unstaged)
    return Recorded(
        layers=subject.layers,
        run=run,
        single=single,
        sharding=subject.sharding,
        notes=(*model.notes, *_notes(subject, run), *notes),
    )


def record_forms(
    model: LoadedModel, setting: TraceSetting, layers: Layers, forms: Sequence[Forms]
) -> Recorded:
    """Run the layers of a model in other forms, undivided. Raises TraceError.

    The pieces of a layer are one behind another, in the order of `forms`.
    """
    subject = RunSubject(model=model, setting=setting, layers=layers, forms=forms)
    run, _ = _expressions(subject, batch=None)
    single, _ = _expressions(subject, batch=1)
    return Recorded(layers=layers, run=run, single=single, sharding=None, notes=())


def sharding_rules(model: LoadedModel, setting: TraceSetting) -> Sharding:
    """What tensor parallelism divides of a model, from a run at concrete sizes and one on shards.

    Raises Unsupported, with the reason, and TraceError.
    """
    subject, check = _first_run(RunSubject(model=model, setting=replace(setting, compiled=False)))
    subject, _ = run_on_shards(subject, _trained_whole(subject, check), Point(backward=False))
    assert subject.sharding is not None
    return subject.sharding


def traced_layers(model: LoadedModel, setting: TraceSetting) -> Layers | None:
    """What a trace takes for the layers of a model, called again or not. Raises TraceError."""
    return _first_run(RunSubject(model=model, setting=setting))[0].layers


def _first_run(subject: RunSubject) -> tuple[RunSubject, RecordedRun]:
    """A run at concrete sizes, and with it the layers in the order of their calls.

    A list whose layers are not called once each, one on what another gave, is no list of layers.
    """
    model = subject.model.module
    layers = find_layers(model)
    with _every_parameter_trained(model) as is_whole:
        layers, run = _searched(subject, layers)
        if layers is None:
            with counted_calls(model) as calls:
                run = _run_without_loops(subject)
            layers = called_again(model, calls)
            if layers is not None:
                layers, run = _searched(subject, layers)
    subject = replace(subject, layers=layers)
    return subject, run if is_whole and run is not None else subject.run(subject.hints)


def _searched(
    subject: RunSubject, layers: Layers | None
) -> tuple[Layers | None, RecordedRun | None]:
    """What of these is a chain of layers, in the order of their calls, and a run that shows it."""
    while layers is not None:
        try:
            run = _run_without_loops(replace(subject, layers=layers))
        except NotALayerList as fault:
            is_new = fault.again and fault.number not in layers.shared
            layers = layers.with_shared(fault.number) if is_new else layers.without(fault.number)
        else:
            return layers.ordered(list(dict.fromkeys(run.order))), run
    return None, None


def _run_without_loops(subject: RunSubject) -> RecordedRun:
    """A run at concrete sizes. Raises TraceError for a loop over the sequence, within seconds."""
    try:
        return replace(subject, limit=OpLimit(max_ops=LONG_OPS)).run(subject.hints)
    except LimitReached:
        if not _is_one_size(subject):
            refuse_loops(subject.model.name, partial(_ops_by_module, subject))
        return subject.run(subject.hints)


def _is_one_size(subject: RunSubject) -> bool:
    """Whether a sample of the model has one size, whatever the sequence length."""
    return subject.model.is_one_size(seq_hint(subject.model, subject.setting.seq_len))


def _ops_by_module(subject: RunSubject, tokens: int) -> Counter[str]:
    """How many operations each module runs in a forward pass at a number of tokens."""
    run = subject.run(Point(batch=BATCH_HINT, seq=tokens, backward=False))
    return Counter(op.module for op in run.ops())


@contextmanager
def counted_calls(model: nn.Module) -> Iterator[Counter[nn.Module]]:
    """Within: how often each module with parameters is called."""
    calls: Counter[nn.Module] = Counter()

    def count(module: nn.Module, args: object) -> None:
        calls[module] += 1

    owners = [m for m in model.modules() if next(m.parameters(), None) is not None]
    hooks = [module.register_forward_pre_hook(count) for module in owners]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _every_parameter_trained(model: nn.Module) -> Iterator[bool]:
    """Within: gradients show what takes what from which. Whether that is the model as it is."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad = True
        yield not frozen
    finally:
        for parameter in frozen:
            parameter.requires_grad = False


def _trained_whole(subject: RunSubject, run: RecordedRun) -> RecordedRun:
    """The run as if every parameter were trained: what takes what from which shows by gradients.

    `run`: of the model as it is, whose kinds of layers are kept apart.
    """
    layers = subject.layers
    if layers is not None:
        first: dict[int, int] = {}
        for index, kind in zip(run.order, run.kinds, strict=True):
            first.setdefault(index, kind)
        layers = replace(layers, signatures=tuple((kind,) for kind in first.values()))
    with _every_parameter_trained(subject.model.module) as is_whole:
        return run if is_whole else replace(subject, layers=layers).run(subject.hints)


def _expressions(subject: RunSubject, batch: int | None) -> tuple[RecordedRun, bool]:
    """The symbolic run, or one fitted to concrete runs where that fails; and whether it is."""
    try:
        return subject.run(Point(batch=batch, backward=batch is None)), False
    except TraceError as fault:
        asked, longest = subject.setting.seq_len, subject.model.max_seq_len
        try:
            if asked is not None:
                seq = seq_hint(subject.model, asked)
                return run_of_one_length(subject.run, seq_len=seq, batch=batch), True
            one_size = _is_one_size(subject)
            return fitted_run(subject.run, longest=longest, batch=batch, one_size=one_size), True
        except (TraceError, NotPolynomial):
            # The error of the symbolic run names a line of the model, that of the fit none.
            raise fault from None


def _compiled_run(subject: RunSubject, eager: RecordedRun) -> RecordedRun:
    """The symbolic run with compiled layers. What enters regions is known from the eager run."""
    run = subject.run(Point())
    for piece, known in zip(run.pieces, eager.pieces, strict=True):
        piece.part.entered, piece.part.flows = known.part.entered, known.part.flows
        piece.part.refusals, piece.part.exposed = known.part.refusals, known.part.exposed
    return run


def _notes_of_operations(names: set[str], run: RecordedRun) -> Iterator[str]:
    """What operations take for granted."""
    if "aten._flash_attention_forward" in names:
        yield WINDOWED
    kernels = {name for packet, name in SCAN_OPS.items() if str(packet) in names}
    recurrent = {name for name in kernels if name.startswith("recurrent")}
    if kernels - recurrent:
        yield SCANS
    if recurrent:
        yield RECURRENCES
    if run.experts or "aten._grouped_mm" in names:
        yield ROUTED


def _notes_of_modules(model: nn.Module) -> Iterator[str]:
    """What libraries of layers take for granted."""
    if passes_messages(model.modules()):
        yield GRAPHS


def _notes(subject: RunSubject, run: RecordedRun) -> Iterator[str]:
    """What a reader of the costs should know."""
    ops = list(run.ops())
    size = subject.sharding.vocab_size if subject.sharding else None
    if subject.layers is None:
        yield NO_LAYERS
    if size is not None and size % 8:
        yield f"the vocabulary of {size} is taken as {size}/t per rank; frameworks pad it"
    if run.own_checkpoints:
        yield OWN_CHECKPOINTS
    if not run.sequential:
        yield SHARED if len(set(run.order)) < len(run.order) else OUT_OF_LINE
    yield from _notes_of_operations({op.name for op in ops}, run)
    yield from _notes_of_modules(subject.model.module)
    if S not in run.fixed and not any(S in op.traffic_bytes.free_symbols for op in ops):
        yield ONE_SIZE
