"""Which layer takes what from which: whether layers form a chain that a pipeline can cut.

A layer's sources are the layers whose outputs it takes, as they are or as operations outside the
layers changed them. Layers form a chain when each takes only what the one before it gives, or what
that one took itself and can pass on (an encoder's result that all layers of a decoder read).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import torch
from torch.autograd.graph import Node

EMBEDDING: Final = -1  # the source of what is made before the first layer


class Flow:
    """Outputs of layers, each a leaf of the autograd graph outside the layers."""

    def __init__(self, embedded: Mapping[int, torch.Tensor]) -> None:
        self._embedded = embedded
        self._maker: dict[int, int] = {}
        self._outputs: list[torch.Tensor] = []  # kept, so that no identity is used twice
        self._sources: list[frozenset[int]] = []
        self._ancestors: list[frozenset[int]] = []

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
