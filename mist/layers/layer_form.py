"""What a level changes of a layer, kept apart from it: put on for the time of a run, then off."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from types import MethodType
from typing import Final

from torch import nn

from mist.layers.surgery import convert_layer

HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks")
_ABSENT: Final = object()

Attributes = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerForm:
    """What a level sets of the modules of a layer, by the path of the module in the layer."""

    changes: Mapping[str, Attributes]

    @contextmanager
    def worn_by(self, layer: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
        """Within: a layer that is built as the one of this form runs as its level says.

        `forward`: its own, where something stands in for it.
        """
        modules = dict(layer.named_modules())
        with ExitStack() as stack:
            stack.enter_context(_with(layer, {"forward": forward}))
            for path, values in self.changes.items():
                bound = {name: _of(modules[path], value) for name, value in values.items()}
                stack.enter_context(_with(modules[path], bound))
            yield


def layer_form(layer: nn.Module, level: str) -> LayerForm:
    """What `convert_layer` makes of a layer, which stays as it is. Raises InputError as that does.

    The layer's own forward is the caller's to run: hooks that it has itself are left out.
    """
    modules = dict(layer.named_modules())
    before = {path: dict(vars(module)) for path, module in modules.items()}
    for module in modules.values():
        # Hooks are added to tables in place, which the layer keeps.
        module.__dict__.update({name: copy(vars(module)[name]) for name in HOOKS})
    hooks = {path: {name: vars(m)[name] for name in HOOKS} for path, m in modules.items()}
    try:
        convert_layer(layer, level)
        changes = {
            path: _changes(before[path], vars(module), hooks[path])
            for path, module in modules.items()
        }
    finally:
        for path, module in modules.items():
            module.__dict__.clear()
            module.__dict__.update(before[path])
    return LayerForm(changes={path: values for path, values in changes.items() if values})


def _changes(before: Attributes, after: Attributes, hooks: Attributes) -> Attributes:
    """The attributes that differ; tables of hooks where one was added."""
    return {
        name: value
        for name, value in after.items()
        if value is not before.get(name, _ABSENT)
        and not (name in hooks and len(hooks[name]) == len(before[name]))  # type: ignore[arg-type]
    }


def _of(module: nn.Module, value: object) -> object:
    """A forward that belongs to this module, not to that of its kind which was converted."""
    return MethodType(value.__func__, module) if isinstance(value, MethodType) else value


@contextmanager
def _with(module: nn.Module, values: Attributes) -> Iterator[None]:
    """Within: a module has these attributes."""
    table = vars(module)
    before = {name: table.get(name, _ABSENT) for name in values}
    table.update(values)
    try:
        yield
    finally:
        table.update(before)
        for name in [name for name in values if table[name] is _ABSENT]:
            del table[name]
