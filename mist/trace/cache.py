"""Traces kept between runs, as JSON, so that planning again needs no torch.

An entry is found by a digest of everything a trace depends on: the source, the versions of torch
and transformers, the tracer's own source and the setting. It also names the local modules that the
model file imported, with their digests, and holds only while they are unchanged. An entry that
cannot be read is as good as none. Expressions are nested lists, ["Add", ["Mul", 2, "b"], "s"], of a
fixed set of functions; nothing is evaluated.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Final, get_args, get_origin, get_type_hints

import platformdirs
import sympy
from sympy import Basic

from mist.graph import B, ModelGraph, S, T
from mist.trace.source import digest

FUNCTIONS: Final[Mapping[str, Callable[..., Basic]]] = MappingProxyType(
    {
        "Add": sympy.Add,
        "Mul": sympy.Mul,
        "Pow": sympy.Pow,
        "Max": sympy.Max,
        "Min": sympy.Min,
        "Mod": sympy.Mod,
        "floor": sympy.floor,
        "ceiling": sympy.ceiling,
        "Rational": sympy.Rational,
        "Half": lambda: sympy.S.Half,
        "Float": sympy.Float,
        "Equality": sympy.Eq,
        "Unequality": sympy.Ne,
        "LessThan": sympy.Le,
        "StrictLessThan": sympy.Lt,
        "GreaterThan": sympy.Ge,
        "StrictGreaterThan": sympy.Gt,
        "And": sympy.And,
        "Or": sympy.Or,
        "Not": sympy.Not,
    }
)
SYMBOLS: Final = MappingProxyType({symbol.name: symbol for symbol in (B, S, T)})

Decode = Callable[[object], object]


def cache_folder() -> Path:
    """Where traces are kept."""
    return Path(platformdirs.user_cache_dir("mist")) / "traces"


def cache_key(content: str, setting: Sequence[str]) -> str:
    """The digest of everything that a trace depends on, apart from local modules."""
    here = Path(__file__).parent
    ours = (*sorted(here.glob("*.py")), here.parent / "graph.py", here.parent / "facts.py")
    tracer = digest(*(path.read_text(encoding="utf-8") for path in ours))
    return digest(content, version("torch"), version("transformers"), tracer, *setting)


def load(key: str) -> ModelGraph | None:
    """The cached graph, or None when there is none that holds."""
    try:
        entry = json.loads((cache_folder() / f"{key}.json").read_text(encoding="utf-8"))
        for path, known in entry["modules"].items():
            if file_digest(Path(path)) != known:
                return None
        exprs = [decode_expr(expr) for expr in entry["exprs"]]
        graph = _decoder(ModelGraph, exprs)(entry["graph"])
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None
    return graph if isinstance(graph, ModelGraph) else None


def store(key: str, graph: ModelGraph, text: str, modules: Sequence[Path]) -> None:
    """Keep a graph and the listing of its operations.

    A folder that cannot be written is no fault: the next run traces again.
    """
    exprs: dict[Basic, int] = {}
    fields = _encode(graph, exprs)
    entry = {
        "modules": {str(path): file_digest(path) for path in modules},
        "exprs": [encode_expr(expr) for expr in exprs],
        "graph": fields,
    }
    with suppress(OSError):
        cache_folder().mkdir(parents=True, exist_ok=True)
        _write(cache_folder() / f"{key}.graph.txt", text)
        _write(cache_folder() / f"{key}.json", json.dumps(entry, separators=(",", ":")))


def file_digest(path: Path) -> str:
    """The digest of a file's text."""
    return digest(path.read_text(encoding="utf-8"))


def _write(path: Path, text: str) -> None:
    """Write beside, then rename: a reader sees all or nothing."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    Path(name).replace(path)


def encode_expr(expr: Basic) -> object:
    """An expression as nested lists. Raises ValueError for a function that is not in the table."""
    if expr.is_Integer:
        return int(expr)
    if expr.is_Symbol and SYMBOLS.get(expr.name) == expr:
        return expr.name
    if expr.is_Rational:
        return ["Rational", expr.p, expr.q]
    if expr.is_Float:
        return ["Float", str(expr)]
    name = type(expr).__name__
    if name not in FUNCTIONS:
        raise ValueError(f"expression {expr} has the unknown function {name}")
    return [name, *(encode_expr(arg) for arg in expr.args)]


def decode_expr(value: object) -> Basic:
    """The expression of nested lists. Raises ValueError for anything else."""
    if isinstance(value, int):
        return sympy.Integer(value)
    if isinstance(value, str) and value in SYMBOLS:
        return SYMBOLS[value]
    if isinstance(value, list) and value and isinstance(value[0], str) and value[0] in FUNCTIONS:
        name, *args = value
        plain = name in ("Rational", "Float")
        return FUNCTIONS[name](*(args if plain else map(decode_expr, args)))
    raise ValueError(f"not an expression: {value!r}")


def _encode(value: object, exprs: dict[Basic, int]) -> object:
    """A dataclass as a list of its fields in order, an expression as its number in `exprs`."""
    if isinstance(value, Basic):
        return exprs.setdefault(value, len(exprs))
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [_encode(getattr(value, f.name), exprs) for f in dataclasses.fields(value)]
    if isinstance(value, tuple):
        return [_encode(each, exprs) for each in value]
    return value


def _decoder(hint: object, exprs: Sequence[Basic]) -> Decode:
    """The function that rebuilds a value of type `hint`."""
    if get_origin(hint) is tuple:
        return _tuple_decoder(_decoder(get_args(hint)[0], exprs))
    if get_origin(hint) is UnionType:
        some = next(arg for arg in get_args(hint) if arg is not NoneType)
        return _optional(_decoder(some, exprs))
    if not isinstance(hint, type):
        return _checked(lambda value: value in get_args(hint))
    if dataclasses.is_dataclass(hint):
        return _dataclass_decoder(hint, exprs)
    if issubclass(hint, Basic):
        return lambda value: exprs[_number(value)]
    return hint if issubclass(hint, Enum) else _checked(lambda value: type(value) is hint)


def _dataclass_decoder(hint: type, exprs: Sequence[Basic]) -> Decode:
    hints = get_type_hints(hint)
    names = [field.name for field in dataclasses.fields(hint)]
    decoders = [_decoder(hints[name], exprs) for name in names]

    def decode(values: object) -> object:
        triples = zip(names, decoders, _list(values), strict=True)
        return hint(**{name: decoder(value) for name, decoder, value in triples})

    return decode


def _tuple_decoder(decode: Decode) -> Decode:
    return lambda values: tuple(map(decode, _list(values)))


def _optional(decode: Decode) -> Decode:
    return lambda value: None if value is None else decode(value)


def _checked(holds: Callable[[object], bool]) -> Decode:
    def decode(value: object) -> object:
        if not holds(value):
            raise ValueError(f"unexpected {value!r}")
        return value

    return decode


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise ValueError(f"not a list: {value!r}")
    return value


def _number(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"not a number of an expression: {value!r}")
    return value
