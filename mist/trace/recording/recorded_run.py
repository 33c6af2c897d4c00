"""What one run recorded of a model: a record for each part, and what holds for all of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import sympy
import torch
from sympy import Basic, Expr
from torch import nn
from torch.utils._pytree import tree_map

from mist.model.graph import Op, SavedTensor
from mist.trace.diagnose import Passed
from mist.trace.dispatch_call import key_of, tensors_in
from mist.trace.operations.sized_calls import SizeRule
from mist.trace.recording.forward_peaks import worst_forward
from mist.trace.recording.graph_edges import output
from mist.trace.recording.recorded_part import Part, SavedStorage
from mist.trace.recording.written_mappings import Written, fresh


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Sizes of a run; None is a symbol. `backward`: whether gradients are run, too."""

    batch: int | None = None
    seq: int | None = None
    backward: bool = True


@dataclass(slots=True, eq=False)
class Piece:
    """The record of one part, with what is known only after it ran.

    `opened`: its results that a layer took, by identity. `flows`: its input has a gradient.
    `outputs`: what it returned; `written`: what it put into mappings that it was given.
    """

    part: Part
    opened: dict[int, torch.Tensor] = field(default_factory=dict)
    boundary_bytes: Expr = sympy.S.Zero
    carried_bytes: Expr = sympy.S.Zero
    flows: bool = False
    transients: tuple[Expr, ...] = ()
    transients_with_grads: tuple[Expr, ...] = ()
    transients_adding: tuple[Expr, ...] = ()
    module: nn.Module | None = None
    outputs: object = None
    written: Written = ()

    def set_outputs(self, outputs: object, entries: Written, inputs: frozenset[int]) -> None:
        """What the part returned and wrote, cut off from it. `inputs`: storages it was given."""
        self.outputs = tree_map(partial(output, inputs), outputs)
        self.written = tree_map(partial(output, inputs), entries)
        nodes, given = self.part.nodes, list(tensors_in((outputs, entries)))
        self.part.results = frozenset(nodes[tensor] for tensor in given if tensor in nodes)
        pairs = zip(tensors_in(entries), tensors_in(self.written), strict=True)
        self.part.hand_on((key_of(made), key_of(cut)) for made, cut in pairs)

    def handed_on(self, shared: dict[int, SavedStorage]) -> Written:
        """What a layer like this writes: tensors of its own, of which `shared` has those saved."""
        entries: Written = tree_map(fresh, self.written)
        for cut, given in zip(tensors_in(self.written), tensors_in(entries), strict=True):
            if (storage := self.part.handed.get(key_of(cut))) is not None:
                shared[key_of(given)] = storage
        return entries


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """What one run recorded. `kinds[i]` is the number in `layers` of the i-th layer.

    `order`: numbers of the layers as they were called. `sequential`: whether each layer takes only
    what the one before gives or passes on. `unstaged`: see `Handovers`. `shared`: what layers saved
    but do not own (rotary tables, masks). `own_checkpoints`: whether the model checkpoints by
    itself, which is undone. `whole`: modules that have all tokens on each rank. `size_rules`,
    `fused`: of a run on shards, see `LocalSizes`.
    """

    embed: Piece
    head: Piece
    layers: tuple[Piece, ...]
    kinds: tuple[int, ...]
    order: tuple[int, ...]
    experts: frozenset[tuple[int, int]]
    sequential: bool
    unstaged: str | None
    shared: tuple[SavedTensor, ...]
    own_checkpoints: bool
    domain: tuple[Basic, ...]
    fixed: Mapping[Expr, Expr]
    originals: Mapping[int, torch.Tensor]
    whole: frozenset[int]
    size_rules: Mapping[int, Mapping[int, SizeRule]]
    fused: Mapping[int, tuple[int, ...]]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The embedding, the distinct layers and the head."""
        return self.embed, *self.layers, self.head

    def forward_bytes(self, piece: Piece) -> tuple[Expr, ...]:
        """Bytes beyond the saved ones in the forward pass of a part that no backward pass covers.

        It covers those of its own part. The embedding is covered by every layer, which goes
        backward while the embedding keeps as much.
        """
        if not piece.transients:
            return ()
        forward = piece.part.live.forward_transients()
        if piece is not self.embed:
            return worst_forward(forward, piece.transients)
        layers = [layer.part.live.most() for layer in self.layers]
        worst = (each for layer in layers for each in worst_forward(forward, layer))
        return tuple(dict.fromkeys(worst))

    def ops(self) -> Iterator[Op]:
        """The operations of all of them."""
        for piece in self.pieces:
            yield from piece.part.ops


class NotALayerList(Passed):
    """The layers of list `number` are not called once each, one on what others gave.

    `again`: because one of them is called again.
    """

    def __init__(self, number: int, *, again: bool = False) -> None:
        super().__init__(number)
        self.number = number
        self.again = again


class LayersDone(Passed):
    """Every layer has run, and nothing else is asked for."""


class OverTokens(Passed):
    """A module of a layer needs all tokens, which was not known: the layer runs again."""
