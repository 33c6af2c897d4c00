"""The functions that the code of a model's modules calls by name, and where the names are."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any

from torch import nn

Place = tuple[dict[str, Any], str, Callable[..., Any]]


def functions_of(modules: Iterable[nn.Module]) -> Iterator[Place]:
    """Each table of names with the name of a function and the function itself.

    Tables are the globals of the modules that the classes lie in, and the attributes of modules.
    """
    modules = list(modules)
    classes = {base for module in modules for base in type(module).__mro__}
    # torch's own modules are no model's, and have many names.
    users = [each for each in classes if not each.__module__.startswith("torch.")]
    tables = [*map(_globals_of, users), *map(vars, modules)]
    for table in {id(table): table for table in tables}.values():
        for name, value in list(table.items()):
            if isinstance(value, FunctionType):
                # A compiled function stands for the one that it is compiled from.
                yield table, name, getattr(value, "_torchdynamo_orig_callable", value)


def _globals_of(owner: type) -> dict[str, Any]:
    """The names that the code of a class sees: those of the module that it is written in."""
    functions = (inspect.unwrap(f) for f in vars(owner).values() if isinstance(f, FunctionType))
    tables = (function.__globals__ for function in functions)
    return next((each for each in tables if each.get("__name__") == owner.__module__), {})
