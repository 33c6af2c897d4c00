"""Graphs as JSON: a dataclass is a list of its fields, an expression a nested list.

["Add", ["Mul", 2, "b"], "s"] is 2 b + s; functions are of a fixed set and nothing is evaluated.
Each expression is written once and referred to by its number. What is read back has the symbols
that may stand in its place, real numbers within bounds, and counts that are not negative.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from types import MappingProxyType, NoneType, UnionType
from typing import Final, get_args, get_origin, get_type_hints

import sympy
from sympy import Basic, Expr
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanFunction

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
NUMBER: Final = re.compile(r"-?[0-9]+(\.[0-9]*)?(e[-+]?[0-9]{1,3})?")
NUM_DIGITS: Final = {"Rational": 2, "Float": 1}
SIZES: Final = frozenset((B, S, T))
# Fields whose expressions have the other symbols too.
TRANSIENT: Final = frozenset(
    f"{name}_bytes"
    for name in ("transient", "transient_with_grads", "transient_adding", "made", "forward")
)
LARGEST_EXPONENT: Final = 64
LARGEST: Final = 2**128  # of numerators and denominators

Decode = Callable[[object], object]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExprTable:
    """Expressions by number; `sizes`: those that have only the symbols of a size."""

    sizes: Mapping[int, Basic]
    every: Mapping[int, Basic]


def encode_graph(graph: ModelGraph) -> dict[str, object]:
    """A graph as JSON values. Raises ValueError for a function that is not in the table."""
    exprs: dict[Basic, int] = {}
    fields = _encode(graph, exprs)
    return {"exprs": [encode_expr(expr) for expr in exprs], "graph": fields}


def decode_graph(entry: Mapping[str, object]) -> ModelGraph | None:
    """The graph of JSON values, or None when they are not one."""
    try:
        every = {i: decode_expr(expr) for i, expr in enumerate(_list(entry["exprs"]))}
        sizes = {i: expr for i, expr in every.items() if expr.free_symbols <= SIZES}
        graph = _decoder(ModelGraph, ExprTable(sizes=sizes, every=every))(entry["graph"])
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError):
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
        if name in NUM_DIGITS:
            # Numbers, or the digits of one: no expressions. A second one would be a precision.
            digits = [_digits(arg) for _, arg in zip(range(NUM_DIGITS[name]), args, strict=True)]
            return _bounded(FUNCTIONS[name](*digits))
        return _applied(name, [decode_expr(arg) for arg in args])
    raise ValueError(f"not an expression: {value!r}")


def _applied(name: str, args: Sequence[Basic]) -> Basic:
    """A function of the table; powers of numbers are small enough to be computed at once."""
    if name == "Pow" and args[-1].is_number and not abs(args[-1]) <= LARGEST_EXPONENT:
        raise ValueError(f"not an exponent: {args[-1]}")
    return _bounded(FUNCTIONS[name](*args))


def _bounded(expr: Basic) -> Basic:
    """The expression. Raises ValueError for one that is no real number, or one without bounds."""
    if expr.is_number and not expr.is_real:
        raise ValueError(f"not a real number: {expr}")
    if expr.is_Rational and max(abs(expr.p), expr.q) > LARGEST:
        raise ValueError("a number beyond all sizes")
    return expr


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


def _decoder(hint: object, exprs: ExprTable) -> Decode:
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
        return _expr_decoder(hint, exprs)
    plain = _number if hint is int else _checked(lambda value: type(value) is hint)
    return hint if issubclass(hint, Enum) else plain


def _expr_decoder(hint: type[Basic], exprs: ExprTable) -> Decode:
    """A size, or a relation of the domain (a symbol would be a Boolean of sympy's, too)."""
    kind = Expr if hint is Expr else Relational | BooleanFunction
    return _checked(
        lambda value: isinstance(value, kind), lambda value: exprs.sizes[_number(value)]
    )


def _dataclass_decoder(hint: type, exprs: ExprTable) -> Decode:
    hints = get_type_hints(hint)
    names = [field.name for field in dataclasses.fields(hint)]
    more = dataclasses.replace(exprs, sizes=exprs.every)
    decoders = [_decoder(hints[name], more if name in TRANSIENT else exprs) for name in names]

    def decode(values: object) -> object:
        triples = zip(names, decoders, _list(values), strict=True)
        return hint(**{name: decoder(value) for name, decoder, value in triples})

    return decode


def _checked(holds: Callable[[object], bool], read: Decode = lambda value: value) -> Decode:
    def decode(value: object) -> object:
        value = read(value)
        if not holds(value):
            raise ValueError(f"unexpected {value!r}")
        return value

    return decode


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise ValueError(f"not a list: {value!r}")
    return value


def _number(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"not a count: {value!r}")
    return value
