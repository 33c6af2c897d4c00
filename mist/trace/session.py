"""One symbolic run of a model: forward with loss and backward, recorded part by part.

The model runs once as it is, but each layer's forward is replaced: the first of its kind runs on
detached inputs and goes backward at once, so its record is its own; a repeated one returns what the
first returned. What the model does before its first layer is recorded as the embedding, the rest
as the head. Layers may differ by their inputs, too (a mask, a table): then they are distinct.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Final

import sympy
import torch
from sympy import Basic, Expr, Integer
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from mist.graph import B, S, SavedTensor, T
from mist.trace.blame import Passed
from mist.trace.expr import Size, Symbols
from mist.trace.fake import DTYPES, Fakes, faked
from mist.trace.loader import LoadedModel
from mist.trace.record import Part, Recorder, key_of, recording
from mist.trace.repeat import Layers
from mist.trace.shim import runs_as
from mist.trace.source import Setting
from mist.trace.tp import Sharding, Share

# A symbol's hint decides branches on shapes. Three samples and a sequence with many divisors are
# typical; a short limit is halved, so that the hint is no limit of the model.
BATCH_HINT: Final = 3
SEQ_HINT: Final = 384


class NotALayerList(Passed):
    """The layers found are not called once each in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Sizes of a run; None is a symbol. `backward`: whether gradients are run, too."""

    batch: int | None = None
    seq: int | None = None
    backward: bool = True


@dataclass(slots=True)
class Piece:
    """The record of one part, with what is known only after it ran."""

    part: Part
    boundary_bytes: Expr = sympy.S.Zero
    transients: tuple[Expr, ...] = ()
    module: nn.Module | None = None
    outputs: object = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one run recorded. `kinds[i]` is the number in `layers` of the i-th layer.

    `shared`: what layers saved but do not own (rotary tables, masks).
    """

    embed: Piece
    head: Piece
    layers: tuple[Piece, ...]
    kinds: tuple[int, ...]
    shared: tuple[SavedTensor, ...]
    domain: tuple[Basic, ...]
    fixed: Mapping[Expr, Expr]
    originals: Mapping[int, torch.Tensor]


class SeedContext(FunctionCtx):
    """What backward needs to know of the outputs."""

    likes: list[tuple[tuple[Size, ...], torch.dtype]]


class Seed(torch.autograd.Function):
    """Starts a backward pass from outputs, without holding the gradients it hands out."""

    @staticmethod
    def forward(ctx: SeedContext, *outputs: torch.Tensor) -> torch.Tensor:
        """A scalar that depends on all outputs."""
        ctx.likes = [(tuple(o.shape), o.dtype) for o in outputs]
        return outputs[0].new_empty(())

    @staticmethod
    def backward(ctx: SeedContext, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of all outputs, new."""
        return tuple(torch.empty(shape, dtype=dtype, device="cpu") for shape, dtype in ctx.likes)


@dataclass
class Session:
    """The state of one run."""

    model: LoadedModel
    layers: Layers | None
    setting: Setting
    sharding: Sharding | None
    point: Point
    symbols: Symbols = field(default_factory=Symbols)
    pieces: list[Piece] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    known: dict[object, int] = field(default_factory=dict)
    open_outputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.units = {unit: self._unit(unit) for unit in self._unit_sizes()}
        self.fakes = Fakes(self.symbols, DTYPES[self.setting.precision], self._local_shape)
        self.recorder = Recorder(self.symbols, self.fakes.originals)
        self.embed = Piece(self.recorder.new_part("embed"))
        self.head = Piece(self.recorder.new_part("head"))

    def run(self) -> Run:
        """Record the model. Raises NotALayerList, or whatever the model raises."""
        batch, seq = self._sizes()
        with self._prepared():
            inputs = self.model.batch(batch, seq)
            self.embed.boundary_bytes = self._total_bytes(inputs)
            self._forward_and_backward(inputs)
        return Run(
            embed=self.embed,
            head=self.head,
            layers=tuple(self.pieces),
            kinds=tuple(self.kinds),
            shared=self._shared(),
            domain=self.symbols.domain(),
            fixed=self.symbols.fixed(),
            originals=dict(self.fakes.originals),
        )

    def _shared(self) -> tuple[SavedTensor, ...]:
        own = self.head.part.shared | self.embed.part.kept.keys()
        kept = {key: each for key, each in self.recorder.shared.items() if key not in own}
        return Part("shared", self.embed.part.live, kept=kept).saved()

    def _sizes(self) -> tuple[Size, Size]:
        batch = self.point.batch or self.symbols.create("b", hint=BATCH_HINT, meaning=B)
        seq = self.point.seq or self.symbols.create("s", hint=seq_hint(self.model), meaning=S)
        return batch, seq

    def _forward_and_backward(self, inputs: object) -> None:
        shared = frozenset(key_of(t) for t in _tensors(inputs))
        first = self.embed if self.layers else self.head
        first.part.shared = self.head.part.shared = shared
        with self.recorder.into(first.part):
            loss = self.model.run(inputs)
        if self.layers and len(self.kinds) != len(self.layers.modules):
            raise NotALayerList
        self.embed.part.live.forward_done()
        self.head.part.live.forward_done()
        if not self.point.backward:
            return
        with self.recorder.into(self.head.part, "backward"):
            loss.backward()
        self._back(self.head, self.open_outputs.get("head", []))
        self._back(self.embed, self.open_outputs.get("embed", []))

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """Within: the model is fake, sharded, recorded, and its layers are replaced."""
        layers = self.layers.modules if self.layers else ()
        inside = {id(m) for layer in layers for m in layer.modules()}
        outside = [m for m in self.model.module.modules() if id(m) not in inside]
        with ExitStack() as self.stack:
            self.stack.enter_context(faked(outside, self.fakes))
            self.stack.enter_context(self._local_attributes())
            for index, layer in enumerate(layers):
                self.stack.enter_context(_replaced(layer, partial(self._on_layer, index)))
            self.stack.enter_context(self.symbols.mode)
            self.stack.enter_context(runs_as(self.setting.policy, self.setting.attention))
            self.stack.enter_context(self._colwise_hooks())
            self.stack.enter_context(recording(self.recorder, self._names(layers)))
            yield

    def _on_layer(
        self,
        index: int,
        forward: Callable[..., object],
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> object:
        """In the place of a layer's forward."""
        if index != len(self.kinds) or self.layers is None:
            raise NotALayerList
        with self.recorder.into(None):
            outer = "head" if index else "embed"
            opened = [t for t in _tensors((args, kwargs)) if t.grad_fn is not None]
            self.open_outputs.setdefault(outer, []).extend(opened)
            key = (self.layers.signatures[index], self._spec((args, kwargs), index))
            if key not in self.known:
                self.known[key] = len(self.pieces)
                self.pieces.append(self._trace(self.layers.modules[index], forward, args, kwargs))
            kind = self.known[key]
            self.kinds.append(kind)
        self.recorder.part = self.head.part
        if index == len(self.layers.modules) - 1:
            self.head.boundary_bytes = self._total_bytes(self.pieces[kind].outputs)
        return self.pieces[kind].outputs

    def _trace(
        self,
        layer: nn.Module,
        forward: Callable[..., object],
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> Piece:
        """Run one layer forward and backward, alone."""
        self.stack.enter_context(faked(layer.modules(), self.fakes))
        args, kwargs = tree_map(_leaf, (args, kwargs))
        tensors = list(_tensors((args, kwargs)))
        own = next((t for t in tensors if t.requires_grad), tensors[0] if tensors else None)
        shared = frozenset(key_of(t) for t in tensors if t is not own)
        piece = Piece(self.recorder.new_part(type(layer).__name__, shared), module=layer)
        piece.boundary_bytes = self._total_bytes(own)
        with self.recorder.into(piece.part):
            outputs = forward(*args, **kwargs)
        piece.part.live.forward_done()
        piece.outputs = tree_map(_leaf, outputs)
        self._back(piece, [t for t in _tensors(outputs) if t.grad_fn is not None])
        return piece

    def _back(self, piece: Piece, outputs: Sequence[torch.Tensor]) -> None:
        """Backward from outputs, if any, and the transient bytes of the part."""
        if self.point.backward:
            if outputs:
                seed: torch.Tensor = Seed.apply(*outputs)  # type: ignore[no-untyped-call]
                gradient = torch.empty((), dtype=seed.dtype, device="cpu")
                with self.recorder.into(piece.part, "backward"):
                    seed.backward(gradient)
            piece.transients = piece.part.live.transients(self._gradients(piece.part))

    def _gradients(self, part: Part) -> frozenset[int]:
        """The storages that became gradients of parameters; they are dropped."""
        found = set()
        for parameter in self.fakes.copies:
            if parameter.grad is not None:
                found.add(part.live.index(parameter.grad))
                parameter.grad = None
        return frozenset(found - {None})  # type: ignore[arg-type]

    def _spec(self, value: object, index: int) -> object:
        """What of a layer's inputs decides its cost."""
        leaves, tree = tree_flatten(value)
        return str(tree), tuple(self._spec_leaf(leaf, index) for leaf in leaves)

    def _spec_leaf(self, leaf: object, index: int) -> object:
        if isinstance(leaf, torch.Tensor):
            return self.symbols.shape(leaf), leaf.dtype, leaf.requires_grad
        is_index = type(leaf) is int and leaf == index
        plain = isinstance(leaf, bool | int | float | str) and not is_index
        return leaf if plain else type(leaf).__name__

    def _total_bytes(self, value: object) -> Expr:
        sizes = {key_of(t): t.untyped_storage().nbytes() for t in _tensors(value)}
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
        # A hint other than the unit itself: at t = 1 a shard would look equal to whole sizes.
        return self.symbols.create(f"unit{unit}", hint=unit + 1, meaning=unit / T)

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

    @contextmanager
    def _colwise_hooks(self) -> Iterator[None]:
        """Within: inputs of column-parallel matrices are known as gathered."""
        colwise = self.sharding.colwise if self.sharding else frozenset[int]()

        def gather(module: nn.Module, args: tuple[object, ...]) -> None:
            if self.recorder.part is not None:
                self.recorder.part.gathered.update(key_of(t) for t in _tensors(args))

        modules = [m for m in self.model.module.modules() if id(m) in colwise]
        hooks = [module.register_forward_pre_hook(gather) for module in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def seq_hint(model: LoadedModel) -> int:
    """The sequence length that decides branches."""
    limit = model.max_seq_len
    return SEQ_HINT if limit is None or limit > SEQ_HINT else max(limit // 2, 2)


@contextmanager
def _replaced(layer: nn.Module, on_call: Callable[..., object]) -> Iterator[None]:
    """Within: `on_call(forward, args, kwargs)` stands in for the layer's forward."""
    forward = layer.forward

    @wraps(forward)
    def stand_in(*args: object, **kwargs: object) -> object:
        return on_call(forward, args, kwargs)

    own = "forward" in vars(layer)
    vars(layer)["forward"] = stand_in
    try:
        yield
    finally:
        if own:
            vars(layer)["forward"] = forward
        else:
            del vars(layer)["forward"]


def _leaf(value: object) -> object:
    """A tensor that needs a gradient, cut off from what made it."""
    if isinstance(value, torch.Tensor) and value.requires_grad:
        return value.detach().requires_grad_()
    return value


def _tensors(value: object) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
