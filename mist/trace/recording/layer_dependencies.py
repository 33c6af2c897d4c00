"""Which layer takes what from which: whether layers form a chain that a pipeline can cut.

Two answers: `Flow` is of pipelines that pass on whatever a stage was given, `Handovers` of those of
`mist apply`, which pass on one activation.

A layer's sources are the layers whose outputs it takes, as they are or as operations outside the
layers changed them. Layers form a chain when each takes only what the one before it gives, or what
that one took itself and can pass on (an encoder's result that all layers of a decoder read).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import torch
from torch.autograd.graph import Node

EMBEDDING: Final = -1  # the source of what is made before the first layer

TAKES_MORE: Final = (
    "a layer takes more than what the layer before it gives (a condition, an encoder's result)"
)
CHANGED: Final = "what a layer gives is changed before the next layer takes it"
NO_SAMPLES: Final = "what layers pass on has no samples in its first dimension (tokens come first)"
CALLED_AGAIN: Final = "a layer is called again with the same parameters"
HEAD_TAKES_MORE: Final = "what follows the last layer takes more than what that layer gives"


class Flow:
    """Outputs of layers, each a leaf of the autograd graph outside the layers."""

    def __init__(self) -> None:
        self._embedded: set[int] = set()
        self._maker: dict[int, int] = {}
        self._outputs: list[torch.Tensor] = []  # kept, so that no identity is used twice
        self._sources: list[frozenset[int]] = []
        self._ancestors: list[frozenset[int]] = []

    def add_embedded(self, tensors: Iterable[torch.Tensor]) -> None:
        """What is made before the first layer, and kept as long as this."""
        self._embedded.update(map(id, tensors))

    def add_outputs(self, layer: int, outputs: Iterable[torch.Tensor]) -> None:
        """Layer number `layer` gave these outputs."""
        for tensor in outputs:
            self._maker[id(tensor)] = layer
            self._outputs.append(tensor)

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether a layer gave this."""
        return id(tensor) in self._maker

    def enters(self, tensors: Iterable[torch.Tensor]) -> bool:
        """The next layer takes these. Whether it takes only what the one before can give it."""
        sources = frozenset(source for t in tensors for source in self._sources_of(t))
        passed = self._sources[-1] | {len(self._sources) - 1} if self._sources else sources
        self._sources.append(sources)
        before = (self._ancestors[each] for each in sources if each != EMBEDDING)
        self._ancestors.append(sources.union(*before))
        return sources <= passed

    @property
    def ancestors(self) -> frozenset[int]:
        """The layers that what entered last comes from, at any distance."""
        return self._ancestors[-1]

    def _sources_of(self, tensor: torch.Tensor) -> Iterator[int]:
        if id(tensor) in self._embedded:
            yield EMBEDDING
        if id(tensor) in self._maker:
            yield self._maker[id(tensor)]
        waiting, visited = [tensor.grad_fn], set[Node | None]({None})
        while waiting:
            node = waiting.pop()
            if node not in visited and node is not None:
                visited.add(node)
                # Outputs of layers are leaves of this graph: their AccumulateGrad nodes know the
                # tensor.
                variable = getattr(node, "variable", None)
                if id(variable) in self._maker:
                    yield self._maker[id(variable)]
                waiting += [following for following, _ in node.next_functions]


class Handovers:
    """What passes from layer to layer of a model that trains all its parameters.

    `mist apply` gives a stage the first tensor that the layer before it returned. All else the
    stage makes again from inputs without parameters, so nothing else may have a gradient.
    `fault`: what is otherwise, in words; None if nothing is.
    """

    def __init__(self) -> None:
        self.fault: str | None = None
        self._given: torch.Tensor | None = None
        self._earlier: list[torch.Tensor | None] = []  # kept, so that no identity is used twice
        self._since = 0

    def enters(self, tensors: Sequence[torch.Tensor], *, again: bool) -> None:
        """The next layer takes these. `again`: it has been called before."""
        if self._given is not None and tensors[0] is not self._given:
            self.fault = CHANGED
        if any(tensor.requires_grad for tensor in tensors[1:]):
            self.fault = TAKES_MORE
        if again:
            self.fault = CALLED_AGAIN

    def leaves(self, tensors: Sequence[torch.Tensor], *, by_sample: bool) -> None:
        """A layer gave these. `by_sample`: the first dimension of the first one is of samples."""
        if not by_sample:
            self.fault = NO_SAMPLES
        self._earlier.append(self._given)
        self._given, *others = tensors
        self._earlier += others
        # Nodes of the autograd graph that are made from now on have this number or a higher one.
        self._since = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]

    def ends(self, loss: torch.Tensor) -> None:
        """What comes behind the last layer has given this."""
        last = None if self._given is None else self._given.grad_fn
        earlier = {id(tensor) for tensor in self._earlier}
        waiting, visited = [loss.grad_fn], set[Node | None]({None, last})
        while waiting:
            node = waiting.pop()
            if node not in visited and node is not None:
                visited.add(node)
                # Leaves have the highest number; those that a layer gave know their tensor.
                is_earlier = id(getattr(node, "variable", self)) in earlier
                if is_earlier or node._sequence_nr() < self._since:
                    self.fault = self.fault or HEAD_TAKES_MORE
                waiting += [following for following, _ in node.next_functions]
