"""Programs as data: what a cache file may say, and nothing else.

A program is a list of assignments and a list of results, each an expression: a number, a name that
was given or assigned before, or a list that begins with a word of the tables below.

    ["x0", ["infix", "b", "*", "s"]]        x0 = (b * s)
    ["maximum", "x0", ["neg", 1.5]]         maximum(x0, (-1.5))

`encode_program` takes a program that was printed in this process apart. `decode_program` writes its
text again, in which every word is one of the tables or of the program's own names: a file can say
a wrong sum, but nothing that opens, imports or calls anything else. Words may still be called with
what they do not take: `program_trial` runs what was read.
"""

import ast
import keyword
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Final

import numpy as np

from mist.symbolic.program import FUNCTIONS, LAWS, Program

JOINED: Final[Mapping[type[ast.operator], str]] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.Pow: "**",
}
# Words that are written side by side without brackets, in which order matters: a - b + c.
LEVELS: Final = (frozenset("+-"), frozenset("*/"))
CALLED: Final = frozenset({*FUNCTIONS, *LAWS, "logical_and.reduce", "logical_or.reduce", "reduce"})
CONSTANTS: Final = frozenset({"nan", "inf", "maximum", "minimum"})
LARGEST_EXPONENT: Final = 64
SEQUENCES: Final = {"list": "[{}]", "tuple": "({},)"}

Data = dict[str, object]


def encode_program(program: Program) -> Data:
    """A program that was printed as JSON values. Raises ValueError for words of no table."""
    (function,) = ast.parse(program.source).body
    assert isinstance(function, ast.FunctionDef)
    *steps, last = function.body
    assert isinstance(last, ast.Return) and isinstance(last.value, ast.Tuple)
    return {
        "inputs": list(program.inputs),
        "outputs": list(program.outputs),
        "steps": [_assigned(step) for step in steps],
        "results": [_encode(value) for value in last.value.elts],
    }


def _assigned(step: ast.stmt) -> list[object]:
    assert isinstance(step, ast.Assign)
    (target,) = step.targets
    assert isinstance(target, ast.Name)
    return [target.id, _encode(step.value)]


def _encode(node: ast.expr) -> object:
    """An expression as nested lists."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.Name(id=name):
            return name
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return ["neg", _encode(operand)]
        case ast.BinOp():
            return _encode_joined(node)
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [type(node).__name__.lower(), *map(_encode, elements)]
        case ast.Call(args=arguments):
            return [_called(node), *map(_encode, arguments)]
    raise ValueError(f"no part of a program: {ast.unparse(node)}")


def _encode_joined(node: ast.BinOp) -> object:
    """A chain such as a - b + c in one list: nested, long sums would be too deep for Python."""
    word = JOINED[type(node.op)]
    level = next((level for level in LEVELS if word in level), frozenset())
    parts: list[object] = [_encode(node.right), word]
    left = node.left
    while isinstance(left, ast.BinOp) and (word := JOINED[type(left.op)]) in level:
        parts += [_encode(left.right), word]
        left = left.left
    return ["infix", _encode(left), *reversed(parts)]


def _called(node: ast.Call) -> str:
    """The name of a function of the tables; where no condition holds, `select` gives nan."""
    name, options = ast.unparse(node.func), [ast.unparse(option) for option in node.keywords]
    if name not in CALLED or options != (["default=nan"] if name == "select" else []):
        raise ValueError(f"no function of a program: {ast.unparse(node)}")
    return name


def decode_program(data: Data) -> Program:
    """The program of JSON values. Raises ValueError for anything that is none."""
    try:
        inputs, outputs = _words(data["inputs"]), _words(data["outputs"])
        steps, results = _list(data["steps"]), _list(data["results"])
        lines, names = _body(steps, inputs)
        values = [_text(value, names) for value in results]
        if len(values) != len(outputs):
            raise ValueError("as many results as outputs")
        returned = f"return ({', '.join(values)}{',' if values else ''})"
        text = [f"def program({', '.join(inputs)}):", *lines, returned]
    except (KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a program: {error}") from error
    return Program(inputs=inputs, outputs=outputs, source="\n    ".join(text) + "\n")


def _body(steps: Iterable[object], inputs: Iterable[str]) -> tuple[list[str], Set[str]]:
    """The assignments as text, and every name that results may use."""
    names = set(CONSTANTS)
    for name in inputs:
        names.add(_new_name(name))
    lines = []
    for step in steps:
        new, value = _list(step)
        assigned = _new_name(new)
        lines.append(f"{assigned} = {_text(value, names)}")
        names.add(assigned)
    return lines, names


def _new_name(name: object) -> str:
    """A name that hides no function: it would be another one's from there on."""
    word = _word(name)
    plain = word.isidentifier() and word.isascii() and not keyword.iskeyword(word)
    if not plain or word in CALLED | CONSTANTS or "__" in word:
        raise ValueError(f"no name: {word!r}")
    return word


def _text(value: object, names: Set[str]) -> str:
    """An expression as Python writes it, in brackets wherever order could be read otherwise."""
    if not isinstance(value, list):
        return _leaf(value, names)
    word, *arguments = value
    if word == "infix":
        return f"({' '.join(_infix(arguments, names))})"
    parts = [_text(argument, names) for argument in arguments]
    if word == "neg" and len(parts) == 1:
        return f"(-{parts[0]})"
    if word in SEQUENCES and parts:
        return SEQUENCES[str(word)].format(", ".join(parts))
    if word in CALLED:
        return _call(str(word), parts)
    raise ValueError(f"no word of a program: {word!r}")


def _call(word: str, parts: list[str]) -> str:
    """A function of the tables with its arguments."""
    ufunc = getattr(np, word, None)  # of one argument more it would write into that
    if isinstance(ufunc, np.ufunc) and len(parts) != ufunc.nin:
        raise ValueError(f"{len(parts)} arguments of {word}")
    default = ", default=nan" if word == "select" else ""
    return f"{word}({', '.join(parts)}{default})"


def _leaf(value: object, names: Set[str]) -> str:
    """A name that is known, or a number that Python reads as the same one."""
    if isinstance(value, str) and value in names:
        return value
    # A negative number is written with "neg"; infinity is a name.
    if isinstance(value, int | float) and 0 <= value < float("inf"):
        return repr(value)
    raise ValueError(f"no name and no number of a program: {value!r}")


def _infix(parts: list[object], names: Set[str]) -> Iterator[str]:
    """Operands with the words between them, all of one level."""
    words = parts[1::2]
    same_level = any(level.issuperset(map(str, words)) for level in LEVELS)
    if len(parts) % 2 == 0 or not (same_level or words == ["**"]):
        raise ValueError(f"no words between operands: {words!r}")
    # Whole numbers have no end in Python: 9**9**9 would be computed for ever.
    if words == ["**"] and isinstance(parts[2], int) and parts[2] > LARGEST_EXPONENT:
        raise ValueError(f"no exponent: {parts[2]}")
    for index, part in enumerate(parts):
        yield str(part) if index % 2 else _text(part, names)


def _words(value: object) -> tuple[str, ...]:
    words = _list(value)
    if len(set(map(str, words))) != len(words):
        raise ValueError("a name twice")
    return tuple(_word(word) for word in words)


def _word(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"no text: {value!r}")
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise ValueError(f"no list: {value!r}")
    return value
