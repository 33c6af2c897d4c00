"""Graphs as JSON: a dataclass is a list of its fields, an expression a nested list.

["Add", ["Mul", 2, "b"], "s"] is 2 b + s; functions are of a fixed set and nothing is evaluated.
Each expression is written once and referred to by its number.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from types import MappingProxyType, NoneType, UnionType
from typing import Final, get_args, get_origin, get_type_hints

import sympy
from sympy import Basic

from mist.model.graph import GATHER_COPY, GATHERS, SCATTER_COPY, B, ModelGraph, Q, S, T

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
        "log": sympy.log,
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
SYMBOLS: Final = MappingProxyType(
    {symbol.name: symbol for symbol in (B, S, T, Q, GATHERS, GATHER_COPY, SCATTER_COPY)}
)
NUMBER: Final = re.compile(r"-?[0-9]+(\.[0-9]*)?(e[-+]?[0-9]+)?")

Decode = Callable[[object], object]


def encode_graph(graph: ModelGraph) -> dict[str, object]:
    """A graph as JSON values. Raises ValueError for a function that is not in the table."""
    exprs: dict[Basic, int] = {}
    fields = _encode(graph, exprs)
    return {"exprs": [encode_expr(expr) for expr in exprs], "graph": fields}


def decode_graph(entry: Mapping[str, object]) -> ModelGraph | None:
    """The graph of JSON values, or None when they are not one."""
    try:
        exprs = [decode_expr(expr) for expr in _list(entry["exprs"])]
        graph = _decoder(ModelGraph, exprs)(entry["graph"])
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None
    return graph if isinstance(graph, ModelGraph) else None


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
        # Their arguments are numbers, or the digits of one, and no expressions.
        each = _digits if name in ("Rational", "Float") else decode_expr
        return FUNCTIONS[name](*map(each, args))
    raise ValueError(f"not an expression: {value!r}")


def _digits(value: object) -> object:
    if type(value) is int or NUMBER.fullmatch(str(value)):
        return value
    raise ValueError(f"not a number: {value!r}")


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
        each = _decoder(get_args(hint)[0], exprs)
        return lambda values: tuple(map(each, _list(values)))
    if get_origin(hint) is UnionType:
        some = _decoder(next(arg for arg in get_args(hint) if arg is not NoneType), exprs)
        return lambda value: None if value is None else some(value)
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
