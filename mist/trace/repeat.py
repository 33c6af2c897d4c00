"""Finds the list of layers of a model, and says which layers cost the same.

The list is the ModuleList, Sequential or ModuleDict whose repeated children hold the most
parameters (the outermost of equals). Two layers are the same when their classes, parameters and
settings agree; a layer's own number in the list is no setting.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from torch import nn

INDEX_NAME: Final = re.compile(r"(^|_)(idx|index|id|number)$")
LISTS: Final = (nn.ModuleList, nn.Sequential, nn.ModuleDict)

Signature = tuple[object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """The layers of a model in the order of their list, and where the list is."""

    path: str
    modules: tuple[nn.Module, ...]
    signatures: tuple[Signature, ...]


def find_layers(model: nn.Module) -> Layers | None:
    """The list of layers, or None when the model has no list of two or more modules."""
    lists = [
        Layers(path=path, modules=children, signatures=tuple(map(signature, children)))
        for path, module in model.named_modules()
        if isinstance(module, LISTS) and len(children := tuple(module.children())) > 1
    ]
    return max(lists, key=_weight, default=None)


def _weight(layers: Layers) -> tuple[int, int]:
    """Parameters in layers that occur more than once; then parameters at all."""
    count = Counter(layers.signatures)
    sizes = [sum(p.numel() for p in module.parameters()) for module in layers.modules]
    pairs = zip(sizes, layers.signatures, strict=True)
    return sum(size for size, known in pairs if count[known] > 1), sum(sizes)


def signature(layer: nn.Module) -> Signature:
    """What decides the cost of a layer, apart from its inputs."""
    parameters = tuple((n, tuple(p.shape), str(p.dtype)) for n, p in layer.named_parameters())
    settings = tuple((name, *_settings(module)) for name, module in layer.named_modules())
    return parameters, settings


def _settings(module: nn.Module) -> Iterator[object]:
    yield type(module).__qualname__
    for name, value in sorted(vars(module).items()):
        if isinstance(value, bool | int | str | float) and not INDEX_NAME.search(name):
            yield name, _setting(value)


def _setting(value: bool | int | str | float) -> object:
    """A float changes what is computed, not its cost, unless it is zero (dropout)."""
    return value != 0.0 if isinstance(value, float) else value
