"""Finds the layers of a model, and says which of them cost the same.

Layers are the children of lists: ModuleList, Sequential, ModuleDict, where a list that is never
called itself (a ModuleList in a ModuleList) stands for its children. Of nested lists the outermost
are preferred whose children mostly repeat (most of their parameters are in children that occur more
than once). If those have under half of the parameters in lists, the outermost lists are taken
(unequal layers). What stands around the repeated children of a list and is of another class (an
embedding, a last norm) is none of its layers; a list that holds a list of layers among other
modules is a namespace, and no list of layers itself. An encoder and a decoder are two lists. Two
layers are the same when their classes, parameters and settings agree; a layer's own number in the
list is no setting.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from torch import nn

# Attributes with the number of a layer (layer_idx), which all layers of a list differ in.
INDEX_NAME: Final = re.compile(r"(^|_)(idx|index|id|number)$")
LISTS: Final = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
NEVER_CALLED: Final = (nn.ModuleList, nn.ModuleDict)
# A list with less than this share of the parameters in lists is a detail (a stem, a small head).
DETAIL_RATIO: Final = 0.02

Signature = tuple[object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """The layers of a model, and for each the number of the list that it is of.

    `shared`: lists whose layers may be called again, with the parameters that they have.
    """

    modules: tuple[nn.Module, ...]
    signatures: tuple[Signature, ...]
    lists: tuple[int, ...]
    shared: frozenset[int] = frozenset()

    def ordered(self, order: Sequence[int]) -> "Layers":
        """The layers `order`, in that order."""
        return replace(
            self,
            modules=tuple(self.modules[i] for i in order),
            signatures=tuple(self.signatures[i] for i in order),
            lists=tuple(self.lists[i] for i in order),
        )

    def with_shared(self, number: int) -> "Layers":
        """The same layers, where those of that list may be called again."""
        return replace(self, shared=self.shared | {number})

    def without(self, number: int) -> "Layers | None":
        """The layers of the other lists, if there are two or more."""
        indices = [i for i, of in enumerate(self.lists) if of != number]
        return self.ordered(indices) if len(indices) > 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _List:
    """One list with its (called) children and how many parameters they hold."""

    path: str
    children: tuple[nn.Module, ...]
    signatures: tuple[Signature, ...]
    size: int
    repeated: int

    @property
    def repeats(self) -> bool:
        return 2 * self.repeated > self.size


def find_layers(model: nn.Module) -> Layers | None:
    """The layers of a model, or None when it has no list of two or more modules."""
    lists = list(_lists(model))
    outermost = _outermost(lists)
    repeating = _outermost([each for each in lists if each.repeats])
    mostly_repeats = repeating and 2 * _total(repeating) >= _total(outermost)
    candidates = repeating if mostly_repeats else outermost
    main_lists = [each for each in candidates if each.size >= DETAIL_RATIO * _total(candidates)]
    if not main_lists:
        return None
    return Layers(
        modules=tuple(child for each in main_lists for child in each.children),
        signatures=tuple(known for each in main_lists for known in each.signatures),
        lists=tuple(number for number, each in enumerate(main_lists) for _ in each.children),
    )


def _lists(model: nn.Module) -> Iterator[_List]:
    for path, module in model.named_modules():
        if isinstance(module, LISTS) and len(children := _stack(module)) > 1:
            signatures = tuple(map(signature, children))
            count, sizes = Counter(signatures), [_size(child) for child in children]
            pairs = zip(sizes, signatures, strict=True)
            yield _List(
                path=path,
                children=children,
                signatures=signatures,
                size=sum(sizes),
                repeated=sum(size for size, known in pairs if count[known] > 1),
            )


def _stack(module: nn.Module) -> tuple[nn.Module, ...]:
    """What may be layers of a list: its (called) children, without what stands around them."""
    nested = [isinstance(child, NEVER_CALLED) and len(child) > 0 for child in module.children()]
    if any(nested) and not all(nested):
        return ()
    children = tuple(_called(module))
    count = Counter(map(signature, children))
    repeated = {type(child) for child in children if count[signature(child)] > 1 and _size(child)}
    inside = [i for i, child in enumerate(children) if type(child) in repeated]
    return children[inside[0] : inside[-1] + 1] if inside else children


def called_again(model: nn.Module, calls: Mapping[nn.Module, int]) -> Layers | None:
    """The block that a model without a list calls again and again, if it is most of the model.

    `calls`: how often each module was called in a run.
    """
    again = {id(m) for m, count in calls.items() if count > 1}
    inside = {id(i) for m in calls if id(m) in again for i in m.modules() if i is not m}
    for module in calls:
        outermost = id(module) in again - inside and module is not model
        # Work is parameters times calls: what runs once may be larger, a vocabulary for one.
        if outermost and calls[module] * _size(module) > _size(model) - _size(module):
            known = (signature(module),)
            return Layers(modules=(module,), signatures=known, lists=(0,), shared=frozenset({0}))
    return None


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """The children, and in the place of a list that is never called its children."""
    for child in module.children():
        if isinstance(child, NEVER_CALLED):
            yield from _called(child)
        else:
            yield child


def _size(layer: nn.Module) -> int:
    """Parameters, without tables of embeddings: these are no work."""
    tables = {id(m.weight) for m in layer.modules() if isinstance(m, nn.Embedding)}
    return sum(p.numel() for p in layer.parameters() if id(p) not in tables)


def _outermost(lists: Sequence[_List]) -> list[_List]:
    """The lists that lie in no other one."""
    return [
        each
        for each in lists
        if not any(other is not each and _inside(each.path, other.path) for other in lists)
    ]


def _inside(path: str, outer: str) -> bool:
    return not outer or path.startswith(f"{outer}.")


def _total(lists: Sequence[_List]) -> int:
    return sum(each.size for each in lists)


def signature(layer: nn.Module) -> Signature:
    """What decides the cost of a layer, apart from its inputs."""
    parameters = tuple(
        (name, tuple(p.shape), str(p.dtype), p.requires_grad)
        for name, p in layer.named_parameters()
    )
    settings = tuple((name, *_settings(module)) for name, module in layer.named_modules())
    return parameters, settings


def _settings(module: nn.Module) -> Iterator[object]:
    yield type(module).__qualname__
    for name, value in sorted(vars(module).items()):
        if not INDEX_NAME.search(name):
            yield name, _setting(value)


def _setting(value: object) -> object:
    """A float changes what is computed, not its cost, unless it is zero (dropout)."""
    if isinstance(value, float):
        return value != 0.0
    if isinstance(value, tuple | list):
        return tuple(map(_setting, value))
    if isinstance(value, bool | int | str):
        return value
    return getattr(value, "__qualname__", None) if callable(value) else None
