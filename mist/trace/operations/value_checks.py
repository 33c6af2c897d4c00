"""Checks of values in a model's code, which are taken to pass: a trace has shapes only.

    if labels.max() >= self.vocab_size: raise ValueError(...)       not taken, nor is one that warns
    assert mask.any()                                               holds

Which part of which condition asks is read from the position of the instruction that runs.
"""

import ast
import linecache
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Final

import torch

OURS: Final = str(Path(__file__).parents[2])
# Between a model and us; what else torch is made of (torch.distributions) checks values as models.
BETWEEN: Final = tuple(str(Path(torch.__file__).parent / each) for each in ("_", "utils"))
WARNS: Final = frozenset({"warn", "warning", "warning_once", "warn_once", "info", "debug", "print"})

Position = tuple[int | None, int | None, int | None, int | None]


def passing_value() -> bool | None:
    """What the condition that asks for a truth value must hear to pass; None: it is no check."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((OURS, *BETWEEN)):
        frame = frame.f_back
    if frame is None:
        return None
    code = frame.f_code
    # Two bytes an instruction, as f_lasti counts.
    run = [*islice(code.co_positions(), frame.f_lasti // 2 + 1)]
    asks = run[-1]
    before = next((each for each in reversed(run) if each != asks), asks)
    return _wanted(code.co_filename, asks, before)


def _wanted(filename: str, asks: Position, before: Position) -> bool | None:
    """The value with which a condition complains of nothing.

    `asks`: the position of the instruction that asks, `before`: of what ran before it.
    """
    for statement in _statements(filename):
        passes = _passes(statement)
        if passes is None:
            continue
        # A jump behind a negation has the position of the whole statement: then what ran before it
        # made the value.
        whole = (asks[0], asks[2]) == (statement.lineno, statement.col_offset)
        position = before if whole else asks
        for part, wanted in _parts(statement.test, wanted=passes):
            if _holds(_position(part), position):
                return wanted
    return None


@lru_cache(maxsize=64)
def _statements(filename: str) -> tuple[ast.If | ast.Assert, ...]:
    """The conditions of a file that can be read."""
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return ()
    return tuple(node for node in ast.walk(tree) if isinstance(node, ast.If | ast.Assert))


def _passes(statement: ast.If | ast.Assert) -> bool | None:
    """The value of the test with which nothing is raised or warned of."""
    if isinstance(statement, ast.Assert):
        return True
    if _only_complains(statement.body):
        return False
    return True if statement.orelse and _only_complains(statement.orelse) else None


def _only_complains(body: Sequence[ast.stmt]) -> bool:
    *_, last = body
    return isinstance(last, ast.Raise) or all(map(_is_warning, body))


def _is_warning(statement: ast.stmt) -> bool:
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Call):
        return False
    func = statement.value.func
    name = func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")
    return name in WARNS


def _parts(test: ast.expr, *, wanted: bool) -> Iterator[tuple[ast.expr, bool]]:
    """What is asked for its truth, and what it must say for the whole to be as wanted."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        yield from _parts(test.operand, wanted=not wanted)
    elif isinstance(test, ast.BoolOp):
        for each in test.values:
            yield from _parts(each, wanted=wanted)
    else:
        yield test, wanted


def _position(node: ast.expr) -> Position:
    return node.lineno, node.end_lineno, node.col_offset, node.end_col_offset


def _holds(outer: Position, inner: Position) -> bool:
    """Whether the inner position lies within the outer one."""
    if None in outer or None in inner:
        return False
    first, last = ((outer[0], outer[2]), (outer[1], outer[3]))
    return first <= (inner[0], inner[2]) and (inner[1], inner[3]) <= last
