"""Writes what is generated in documents: `make docs`. tests/test_docs.py compares it.

docs/cli.md comes from the typer commands. The tree in docs/concepts.md comes from the layers in
pyproject.toml and the first docstring line of each room and module. The lists of files in
docs/extending.md are the modules that name an idea. docs/schema has the JSON Schema of what each
command prints with --json.
"""

import ast
import json
import math
import re
import tomllib
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

import typer.main
from typer.core import TyperArgument, TyperCommand, TyperOption

from mist.cli.application import app
from mist.cli.common import argument_name
from mist.report.json_schemas import PLAN, RESULTS, json_schema

ROOT = Path(__file__).parents[1]
CLI = ROOT / "docs" / "cli.md"
CONCEPTS = ROOT / "docs" / "concepts.md"
SCHEMAS = ROOT / "docs" / "schema"
EXTENDING = ROOT / "docs" / "extending.md"
BLOCK = re.compile(r"(?s)(<!-- make docs: (\w+) -->).*?(<!-- end -->)")
# What a module that knows of an idea has in its text.
IDEAS = {
    "level": r"\bMemoryLevel\b",
    "knob": r"\bdp[_-]replicate\b",
    "schedule": r"\bScheduleKind\b",
    "optimizer": r"\bOptimizer\b|adamw",
}

CLI_HEAD = """# Commands and options

Written by `make docs` from the commands themselves; do not edit.
`mist COMMAND --help` prints the same.
[Getting started](getting-started.md) explains the options with examples.

Results go to stdout, progress and errors to stderr. Exit codes:

| code | meaning |
|---|---|
| 0 | planned, or it fits, or done |
| 1 | a training run failed, or the result cannot be written to stdout |
| 2 | the input cannot be used; the message says why and what to try |
| 3 | nothing fits, or this layout does not |
| 4 | prediction and dry run differ |
| 70 | an error of Mist itself: one line, and a file with what to report |
| 130, 143 | interrupted; ended by SIGTERM |
"""


def cli_page() -> str:
    """The whole of docs/cli.md, by name: what is imported first must not decide."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return CLI_HEAD + "".join(
        f"\n{_command(name, each)}" for name, each in sorted(commands.items())
    )


def _command(name: str, command: TyperCommand) -> str:
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option"]
    words = " ".join([name, *map(argument_name, arguments)])
    lines = [f"## `mist {words}`", "", _escaped(command.help), ""]
    lines += ["| argument or option | takes | default | meaning |", "|---|---|---|---|"]
    lines += [_row(f"`{argument_name(each)}`", each) for each in arguments]
    lines += [_row(f"`{', '.join(each.opts)}`", each) for each in options]
    lines += ["", f"    {command.epilog}"]
    return "\n".join(lines) + "\n"


def _row(name: str, parameter: TyperArgument | TyperOption) -> str:
    takes = _takes(parameter.type_descriptor.annotation)
    return f"| {name} | {takes} | {_default(parameter)} | {_escaped(parameter.help)} |"


def _takes(annotation: type) -> str:
    """The values that a parameter accepts, in words."""
    if get_origin(annotation) in {list, tuple}:
        return f"{_takes(get_args(annotation)[0])}; may be repeated"
    if isinstance(annotation, UnionType):
        return _takes(get_args(annotation)[0])
    if issubclass(annotation, Enum):
        return ", ".join(f"`{each.value}`" for each in annotation)
    names = {bool: "nothing", str: "text", int: "whole number", float: "number", Path: "path"}
    return names[annotation]


def _default(parameter: TyperArgument | TyperOption) -> str:
    if parameter.required:
        return "must be given"
    match parameter.default:
        case None | False | "":
            return ""
        case Enum(value=value):
            return f"`{value}`"
        case float(number) if math.isinf(number):
            return "no limit"
        case value:
            return f"`{value}`"


def _escaped(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().replace("|", r"\|")


def tree() -> str:
    """The rooms, highest first, with every module once and the first line of its docstring."""
    lines = []
    for layer in _layers():
        rooms = [word for word in re.split(r"[\s|()]+", layer) if word]
        for room in rooms:
            lines += _room(room)
    return "\n".join(["```text", *lines, *_module(ROOT / "mist" / "__init__.py", ""), "```"])


def _layers() -> list[str]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = settings["tool"]["importlinter"]["contracts"]
    return next(each["layers"] for each in contracts if each["type"] == "layers")


def _room(room: str) -> Iterator[str]:
    path = ROOT / "mist" / room
    if path.with_suffix(".py").exists():
        yield from _module(path.with_suffix(".py"), "")
    elif path.exists():
        yield from _folder(path, "")


def _folder(folder: Path, indent: str) -> Iterator[str]:
    """A folder, its modules, then its sub-folders."""
    yield _line(f"{indent}{folder.name}/", folder / "__init__.py")
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            yield from _module(path, indent + "  ")
    for path in sorted(folder.iterdir()):
        if (path / "__init__.py").exists():
            yield from _folder(path, indent + "  ")


def _module(path: Path, indent: str) -> Iterator[str]:
    yield _line(indent + path.name, path)


def _line(name: str, path: Path) -> str:
    """A name and what its docstring begins with: the first line, or the first sentence of it."""
    first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
    return f"{name:34}{first}".rstrip()


def modules_of(idea: str) -> str:
    """The modules that name an idea, by room, as points of a list."""
    rooms: dict[str, list[str]] = {}
    for path in sorted((ROOT / "mist").rglob("*.py")):
        if re.search(IDEAS[idea], path.read_text()):
            file = path.relative_to(ROOT)
            rooms.setdefault(file.parts[1], []).append(f"`{file}`")
    count = sum(len(files) for files in rooms.values())
    lines = [f"- {room}: {', '.join(files)}" for room, files in rooms.items()]
    return "\n".join([f"{count} modules name it today:", "", *lines])


def with_blocks(text: str) -> str:
    """A document with its generated blocks as they should be."""

    def block(match: re.Match[str]) -> str:
        name = match[2]
        return f"{match[1]}\n\n{tree() if name == 'tree' else modules_of(name)}\n\n{match[3]}"

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    CLI.write_text(cli_page())
    for page in (CONCEPTS, EXTENDING):
        page.write_text(with_blocks(page.read_text()))
    SCHEMAS.mkdir(exist_ok=True)
    for schema in (PLAN, *RESULTS):
        text = json.dumps(json_schema(schema), indent=1) + "\n"
        (SCHEMAS / f"{schema.replace('/', '-')}.json").write_text(text)
