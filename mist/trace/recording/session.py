"""One symbolic run of a model: forward with loss and backward, recorded part by part.

The model runs once as it is, but each layer's forward is replaced: the first of its kind runs on
detached inputs and goes backward at once, so its record is its own; a repeated one returns what the
first returned. What the model does before its first layer and between two lists of layers (an
encoder and a decoder) is recorded as the embedding, the rest as the head. Layers may differ by
their inputs, too (a mask, a table): then they are distinct.
A run of layers in other forms records each distinct layer in every form, on the same inputs, and
ends behind the last layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from sympy import Expr, Integer
from torch import nn
from torch.utils._pytree import tree_map

from mist.errors import TraceError
from mist.layers import LayerForm
from mist.layers.own_checkpoints import undone_checkpoints
from mist.model.graph import B, S, SavedTensor, T
from mist.plans.workload import HeadMode
from mist.trace.dispatch_call import key_of, tensors_in
from mist.trace.expressions import Size, Symbols
from mist.trace.models.fake_tensors import DTYPES, Fakes, fake_tables
from mist.trace.models.loader import LoadedModel
from mist.trace.models.source import TraceSetting
from mist.trace.operations.autocast import forward_in, outside
from mist.trace.operations.routing import Routing
from mist.trace.recording.compiled import compiled
from mist.trace.recording.graph_edges import Seed, activation, leaf
from mist.trace.recording.input_spec import input_spec
from mist.trace.recording.layer_dependencies import Flow, Handovers
from mist.trace.recording.liveness import Counted
from mist.trace.recording.op_limit import OpLimit
from mist.trace.recording.recorded_part import Origin, Part
from mist.trace.recording.recorded_run import (
    LayersDone,
    NotALayerList,
    OverTokens,
    Piece,
    Point,
    RecordedRun,
)
from mist.trace.recording.recorder import Recorder, recording
from mist.trace.recording.region_hooks import region_hooks
from mist.trace.recording.replaced_forward import replaced_forward
from mist.trace.recording.shim import fused_norms, runs_as
from mist.trace.recording.size_hints import BATCH_HINT, seq_hint
from mist.trace.recording.written_mappings import (
    contents,
    mappings_in,
    opened,
    with_leaves,
    write,
    written,
)
from mist.trace.repeated_blocks import Layers, Signature
from mist.trace.tensor_parallel.local_sizes import LocalSizes
from mist.trace.tensor_parallel.tp_sharding import (
    Sharding,
    Share,
    module_over_tokens,
    rank_modules,
)

Forms = Mapping[Signature, LayerForm]
"""The layers of a model at a level, by what they are."""


@dataclass
class Session:
    """The state of one run. `forms`: what layers are recorded as; none: as they are."""

    model: LoadedModel
    layers: Layers | None
    setting: TraceSetting
    sharding: Sharding | None
    point: Point
    limit: OpLimit | None = None
    forms: Sequence[Forms] = ()
    symbols: Symbols = field(default_factory=Symbols)
    pieces: list[Piece] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    known: dict[object, int] = field(default_factory=dict)
    seeds: list[torch.Tensor] = field(default_factory=list)
    sequential: bool = True
    handovers: Handovers = field(default_factory=Handovers)
    calls_of: dict[int, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.seq_hint = seq_hint(self.model, self.setting.seq_len)
        self.sizes = self._sizes()
        self.units = {unit: self._unit(unit) for unit in self._unit_sizes()}
        dtype = DTYPES[self.setting.precision]
        self.low = dtype if self.setting.autocast else None
        wide = torch.float32 if self.setting.autocast else dtype
        self.fakes = Fakes(self.symbols, wide, self._local_shape)
        self.local_sizes = LocalSizes(self.symbols, self.units)
        parameters = self.model.module.parameters()
        self.all_trained = all(p.requires_grad for p in parameters if p.is_floating_point())
        self.whole = self.sharding.whole if self.sharding else frozenset[int]()
        self.colwise = self.sharding.colwise if self.sharding else frozenset[int]()
        rank = rank_modules(self.sharding, self.model.module)
        self.recorder = Recorder(self.symbols, self.fakes.originals, rank=rank, limit=self.limit)
        self.embed = Piece(self.recorder.new_part("embed"))
        self.head = Piece(self.recorder.new_part("head"))
        # There gradients are made in the forward pass.
        self.head.part.works_forward = self.setting.head is HeadMode.IN_FORWARD
        self.outer = self.embed if self.layers else self.head
        self.flow, ratio = Flow(), self.setting.capacity_ratio
        hints = {B: BATCH_HINT, S: self.seq_hint}
        sizes = {B: self.point.batch or B, S: self.point.seq or S}
        self.routing = Routing(self.symbols, self.recorder.callers, hints, sizes, ratio)

    def run(self) -> RecordedRun:
        """Record the model. Raises NotALayerList, or whatever the model raises."""
        batch, seq = self.sizes
        with self._prepared():
            inputs = self.model.map_inputs(self._input, self.model.batch(batch, seq))
            self.embed.boundary_bytes = self._total_bytes(inputs)
            with suppress(LayersDone):
                self._forward_and_backward(inputs)
        return RecordedRun(
            embed=self.embed,
            head=self.head,
            layers=tuple(self.pieces),
            kinds=tuple(self.kinds),
            order=tuple(self.order),
            experts=frozenset(self.routing.experts),
            sequential=self.sequential,
            unstaged=self.handovers.fault,
            shared=self._shared(),
            own_checkpoints=bool(self.undone),
            domain=self.symbols.domain(),
            fixed=self.symbols.fixed(),
            originals=dict(self.fakes.originals),
            whole=self.whole,
            size_rules=self.local_sizes.rules,
            fused=self.local_sizes.fused,
        )

    def _shared(self) -> tuple[SavedTensor, ...]:
        outer_keys = self.head.part.shared | self.embed.part.storages.keys()
        storages = {
            key: each for key, each in self.recorder.shared.items() if key not in outer_keys
        }
        return Part("shared", self.embed.part.live, storages=storages).saved()

    def _sizes(self) -> tuple[Size, Size]:
        batch = self.point.batch or self.symbols.create("b", hint=BATCH_HINT, meaning=B)
        seq = self.point.seq or self.symbols.create(
            "s", hint=seq_hint(self.model, self.setting.seq_len), meaning=S
        )
        return batch, seq

    def _input(self, value: object) -> object:
        """Floating inputs take the compute precision, as under FSDP2's mixed precision."""
        if self.setting.autocast or not isinstance(value, torch.Tensor):
            return value
        return value.to(DTYPES[self.setting.precision]) if value.is_floating_point() else value

    def _entering(self, value: object) -> object:
        """So do activations that what lies before the layers made in another one, at a layer.

        FSDP2's groups cast what they are given: a table of positions in a buffer makes fp32.
        """
        if isinstance(value, torch.Tensor) and value.requires_grad and not self.flow.knows(value):
            return self._input(value)
        return value

    def _forward_and_backward(self, inputs: object) -> None:
        self.shared_keys = frozenset(key_of(t) for t in tensors_in(inputs))
        self.embed.part.shared = self.head.part.shared = self.shared_keys
        with self.recorder.into(self.outer.part), forward_in(self.low):
            loss = self.model.run(inputs)
        self.handovers.ends(loss)
        if not loss.requires_grad:
            raise TraceError(
                f"the loss of {self.model.name} has no gradient: it depends on no parameter with "
                "requires_grad=True. Train a parameter that the loss depends on."
            )
        lists = self.layers.lists if self.layers else ()
        for index, number in enumerate(lists):
            if index not in self.order:
                raise NotALayerList(number)
        ends = (self.head, self.embed)
        for piece in ends:
            piece.part.live.forward_done(piece.part.gathered)
            piece.opened.clear()
        if self.point.backward:
            # The parts outside the layers go backward together: autograd orders them by sequence
            # number.
            starts = [loss, *self.seeds]
            gradients = [None, *map(torch.empty_like, self.seeds)]
            with self.recorder.backward_of(piece.part for piece in ends):
                torch.autograd.backward(starts, gradients)
            self._backward_done(ends)

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """Within: the model is fake, sharded, recorded, and its layers are replaced."""
        layers = self.layers.modules if self.layers else ()
        inside = {id(m) for layer in layers for m in layer.modules()}
        outside = [m for m in self.model.module.modules() if id(m) not in inside]
        with ExitStack() as self.stack:
            self.stack.enter_context(fake_tables(outside, self.fakes))
            self.stack.enter_context(self._local_attributes())
            for index, layer in enumerate(layers):
                self.stack.enter_context(replaced_forward(layer, partial(self._on_layer, index)))
            self.stack.enter_context(self.symbols.mode)
            self.stack.enter_context(runs_as(self.setting, self.model.module.modules()))
            self.undone = self.stack.enter_context(undone_checkpoints())
            if self.setting.fused_norms:
                for norm, kernel in fused_norms(self.model.module.modules()):
                    self.stack.enter_context(replaced_forward(norm, kernel))
            self.stack.enter_context(self.routing)
            if self.sharding is not None:
                self.stack.enter_context(
                    region_hooks(self.recorder, self.sharding, self.model.module)
                )
            # The mode that is entered last sees a call first: the recorder sees operations of the
            # model, not their stand-ins.
            self.stack.enter_context(recording(self.recorder, self._names(layers)))
            if self.sharding is not None:
                # Outermost: calls that stand-ins make are not the model's.
                columns = [m for m in self.model.module.modules() if id(m) in self.colwise]
                self.stack.enter_context(self.local_sizes.within(columns))
            yield

    def _on_layer(
        self,
        index: int,
        forward: Callable[..., object],
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> object:
        """In the place of a layer's forward."""
        assert self.layers is not None
        again = index in self.order
        if again and self.layers.lists[index] not in self.layers.shared:
            raise NotALayerList(self.layers.lists[index], again=True)
        args, kwargs = tree_map(self._entering, (args, kwargs))
        with self.recorder.into(None):
            inputs = opened((args, kwargs))
            self._enter_layer(inputs)
            self.handovers.enters(list(tensors_in(inputs)), again=again)
            self._refuse_parallel(self.layers.lists[index])
            # A block that is called again costs what it did, but brings no parameters.
            self.sequential &= not again
            spec = input_spec(inputs, self._place_of(index), self.symbols)
            key = (self.layers.signatures[index], spec, again)
            if key not in self.known:
                self.known[key] = len(self.pieces)
                self.pieces.extend(self._traced(index, forward, args, kwargs))
            kind = self.known[key]
            self.order.append(index)
            self.kinds.append(kind)
            # Leaves: the backward pass of what follows ends here, as the layer has had its own.
            piece = self.pieces[kind]
            leaves = tree_map(leaf, piece.outputs), piece.handed_on(self.recorder.shared)
            outputs, entries = tree_map(self._as_input, leaves)
            write(entries, mappings_in((args, kwargs)))
            self.flow.add_outputs(
                len(self.kinds) - 1, [*tensors_in(leaves), *tensors_in((outputs, entries))]
            )
            given = list(tensors_in((outputs, entries)))
            self.handovers.leaves(given, by_sample=self._is_by_sample(given[0]))
            self._leave_layer(index)
            if self.forms and not self.layers.shared and len(self.order) == len(self.layers.lists):
                raise LayersDone
        self.recorder.part = self.outer.part
        return outputs

    def _is_by_sample(self, tensor: torch.Tensor) -> bool:
        """Whether the first dimension is of samples; as expressions, which guard nothing."""
        return self.symbols.shape(tensor)[:1] == (self.symbols.expr(self.sizes[0]),)

    def _refuse_parallel(self, number: int) -> None:
        """Raise NotALayerList for a list whose layers do not take what others of it gave.

        Tables, heads or experts in a list. What takes what from which shows by gradients, so only
        where all parameters are trained and gradients are recorded.
        """
        earlier = self.calls_of.setdefault(number, set())
        if earlier and self.shows_flow and not earlier & self.flow.ancestors:
            raise NotALayerList(number)
        earlier.add(len(self.kinds))

    @property
    def shows_flow(self) -> bool:
        """Whether gradients flow back from each layer to those before it."""
        return self.all_trained and torch.is_grad_enabled()

    def _place_of(self, index: int) -> int:
        """The number that a layer has in its own list."""
        assert self.layers is not None
        return self.layers.lists[:index].count(self.layers.lists[index])

    def _enter_layer(self, inputs: object) -> None:
        """What runs outside the layers ends here, and what it made is an output of it."""
        tensors = [t for t in tensors_in(inputs) if t.requires_grad]
        fresh = {id(t): t for t in tensors if t.grad_fn is not None and not self._is_open(t)}
        self.outer.opened.update(fresh)
        if not self.order:
            self.flow.add_embedded(fresh.values())
        if fresh and self.point.backward:
            self.seeds.append(self._seed(self.outer, list(fresh.values())))
        self.sequential &= self.flow.enters(tensors)

    def _is_open(self, tensor: torch.Tensor) -> bool:
        return self.flow.knows(tensor) or any(
            id(tensor) in piece.opened for piece in (self.embed, self.head)
        )

    def _as_input(self, value: object) -> object:
        """Autocast takes a leaf that needs a gradient for a weight, and keeps its cast."""
        if self.low is not None and isinstance(value, torch.Tensor) and value.requires_grad:
            return value.view_as(value)
        return value

    def _leave_layer(self, index: int) -> None:
        """What comes next is the head, or what lies between two lists."""
        assert self.layers is not None
        later_lists = [of for i, of in enumerate(self.layers.lists) if i not in self.order]
        is_between = bool(later_lists) and self.layers.lists[index] not in later_lists
        self.outer = self.embed if is_between else self.head
        if not later_lists:
            last = self.pieces[self.kinds[-1]]
            self.head.boundary_bytes = self._total_bytes(last.outputs)
            self.head.flows = any(t.requires_grad for t in tensors_in(last.outputs))

    def _traced(
        self,
        index: int,
        forward: Callable[..., object],
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> Iterator[Piece]:
        """Run one layer, alone, in each of the forms that are asked for."""
        assert self.layers is not None
        layer = self.layers.modules[index]
        self.stack.enter_context(fake_tables(layer.modules(), self.fakes))
        if not self.forms:
            yield self._trace(layer, forward, args, kwargs)
        for form in self.forms:
            with form[self.layers.signatures[index]].worn_by(layer, forward):
                yield self._trace(layer, layer.forward, args, kwargs)

    def _trace(
        self,
        layer: nn.Module,
        forward: Callable[..., object],
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> Piece:
        """Run one layer forward and backward, alone."""
        inputs = args, kwargs
        args, kwargs = with_leaves(self._as_input, with_leaves(leaf, inputs))
        tensors, mappings = list(tensors_in(opened((args, kwargs)))), mappings_in((args, kwargs))
        piece, before = self._open(layer, tensors), contents(mappings)
        run = self._runner(piece.part, layer, forward, (args, kwargs))
        try:
            with self.recorder.into(piece.part):
                outputs = run()
        except OverTokens:
            return self._trace(layer, forward, *inputs)
        entries = written(mappings, before)
        self._forward_done(piece.part, tensors)
        if self.layers and len(set(self.layers.signatures)) == 1:
            piece.part.leave(list(tensors_in(outputs)))
        piece.set_outputs(outputs, entries, frozenset(map(key_of, tensors)))
        starts = [t for t in tensors_in((outputs, entries)) if t.grad_fn is not None]
        seed = self._seed(piece, starts) if starts and self.point.backward else None
        # What comes after the layer frees its results before it goes backward.
        del outputs, entries, starts
        if seed is not None:
            gradient = torch.empty_like(seed)
            with self.recorder.into(piece.part, "backward"), outside(self.low):
                seed.backward(gradient)
        if self.point.backward:
            self._backward_done([piece])
        return piece

    def _widen(self, layer: nn.Module, name: str) -> None:
        """A module needs all tokens, and what is around it. Raises OverTokens where it is new."""
        module = id(module_over_tokens(layer, name))
        if module not in self.whole:
            self.whole |= {module}
            self.recorder.widen(module)
            raise OverTokens

    def _forward_done(self, part: Part, inputs: Sequence[torch.Tensor]) -> None:
        """A layer ran forward; who called it holds what nobody saved of its inputs."""
        kept = {*self.recorder.shared, *self.embed.part.storages, *self.fakes.originals}
        if not part.forward_only:
            part.live.forward_done(part.gathered, [t for t in inputs if key_of(t) not in kept])

    def _open(self, layer: nn.Module, tensors: Sequence[torch.Tensor]) -> Piece:
        """The record of a layer that is about to run on these tensors."""
        hidden = activation(tensors)
        # Masks and rotary tables are arguments of all layers, and saved once.
        shared = frozenset(key_of(t) for t in tensors if t is not hidden)
        piece = Piece(self.recorder.new_part(type(layer).__name__, shared, hidden), module=layer)
        piece.boundary_bytes = self._total_bytes(hidden)
        piece.flows = hidden is not None and hidden.requires_grad
        carried = [t for t in tensors if t.requires_grad and t is not hidden]
        piece.carried_bytes = self._total_bytes(carried)
        piece.part.forward_only = not any(t.requires_grad for t in (*layer.parameters(), *tensors))
        if piece.part.forward_only:
            piece.part.live.forward_done(())
        if hidden is not None:
            piece.part.live.hold(hidden)
        return piece

    def _runner(
        self,
        part: Part,
        layer: nn.Module,
        forward: Callable[..., object],
        inputs: tuple[tuple[object, ...], dict[str, object]],
    ) -> Callable[[], object]:
        """What runs a layer's forward: itself, or its compiled graph."""
        args, kwargs = inputs
        if not self.setting.compiled:  # a compiled graph hides modules
            part.on_tokens = partial(self._widen, layer)
            return partial(forward, *args, **kwargs)
        part.compiled = True
        part.whole = any(id(module) in self.whole for module in layer.modules())
        sizes = torch.empty(()).expand(*self.sizes, *self.units.values())
        return compiled(layer, forward, inputs, sizes=sizes, on_call=self.recorder.on_call)

    def _seed(self, piece: Piece, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """A scalar whose backward pass starts that of a part."""
        seed: torch.Tensor = Seed.apply(*outputs)  # type: ignore[no-untyped-call]
        assert seed.grad_fn is not None
        piece.part.origins.setdefault(seed.grad_fn._sequence_nr(), Origin())
        return seed

    def _backward_done(self, pieces: Sequence[Piece]) -> None:
        """The transient bytes of parts, and the end of the gradients of parameters."""
        for piece in pieces:
            live = piece.part.live
            live.backward_done(p.grad for p in self.fakes.copies if p.grad is not None)
            piece.transients = live.transients()
            piece.transients_with_grads = live.transients(Counted.SO_FAR)
            piece.transients_adding = live.transients(Counted.MADE_NOW)
        for parameter in self.fakes.copies:
            parameter.grad = None

    def _total_bytes(self, value: object) -> Expr:
        sizes = {key_of(t): t.untyped_storage().nbytes() for t in tensors_in(value)}
        return sum((self.symbols.expr(size) for size in sizes.values()), Integer(0))

    def _names(self, layers: Sequence[nn.Module]) -> dict[nn.Module, str]:
        names = {module: name for name, module in self.model.module.named_modules()}
        for layer in layers:
            names.update({module: name for name, module in layer.named_modules()})
        return names

    def _unit_sizes(self) -> set[int]:
        shares = self.sharding.params.values() if self.sharding else ()
        return {share.unit for share in shares}

    def _unit(self, unit: int) -> torch.SymInt:
        # A hint other than the unit itself: at t = 1 a shard would look equal to whole sizes. Below
        # it, as a part is cut from a whole table; a size below 2 is taken for a number.
        hint = unit - 1 if unit > 2 else unit + 1
        return self.symbols.create(f"unit{unit}", hint=hint, meaning=unit / T)

    def _local(self, share: Share) -> Size:
        return share.multiple * self.units[share.unit]

    def _local_shape(self, tensor: torch.Tensor) -> tuple[Size, ...] | None:
        share = self.sharding.params.get(id(tensor)) if self.sharding else None
        if share is None:
            return None
        shape: list[Size] = list(tensor.shape)
        shape[share.dim] = self._local(share)
        return tuple(shape)

    @contextmanager
    def _local_attributes(self) -> Iterator[None]:
        attributes = self.sharding.attributes if self.sharding else ()
        before = [table[name] for table, name, _ in attributes]
        for table, name, share in attributes:
            table[name] = self._local(share)
        try:
            yield
        finally:
            for (table, name, _), value in zip(attributes, before, strict=True):
                table[name] = value
