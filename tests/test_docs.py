"""Documents name what exists: modules, functions, fields, files, commands and their options."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer.main

from mist.cli.common import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "docs/decisions/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"  # it tells what was
)
# Paths that a document says are not, or are elsewhere.
ELSEWHERE = frozenset({"mist/plan.py", "mist/traces"})
FOLDERS = ("mist", "tests", "benchmarks", "profiles", "plans", "examples", "docs")

# Names of torch that documents cite.
FOREIGN = frozenset(
    {
        "_chunk_or_narrow_cat",
        "_maybe_view_chunk_cat",
        "all_reduce_grads",
        "torch.utils.flop_counter",
    }
)

SPAN = re.compile(r"`([^`\n]+)`")
FILE = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*[\w/]")
NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
COMMAND = re.compile(r"\bmist ([a-z]+)\b([^`|#\n]*)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def spans(text: str) -> Iterator[str]:
    """What stands between backticks, outside of indented and fenced blocks too."""
    yield from SPAN.findall(text)


@cache
def known_names() -> frozenset[str]:
    """Every name in the sources, the tests and the profiles, of whatever kind."""
    found: set[str] = set()
    for folder in ("mist", "tests", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            if path == Path(__file__):
                continue
            found.add(path.stem)
            for node in ast.walk(ast.parse(path.read_text())):
                found |= names_of(node)
    for path in [*(ROOT / "profiles").rglob("*.yaml"), *(ROOT / "plans").glob("*.yaml")]:
        found |= set(re.findall(r"[A-Za-z_][\w-]*", path.read_text()))
    return frozenset(found)


def names_of(node: ast.AST) -> set[str]:
    """The names that one node of a syntax tree brings."""
    for kind, fields in (
        (ast.FunctionDef | ast.ClassDef, ("name",)),
        (ast.Attribute, ("attr",)),
        (ast.arg, ("arg",)),
        (ast.Name, ("id",)),
        (ast.keyword, ("arg",)),
        (ast.alias, ("name",)),
    ):
        if isinstance(node, kind):
            return {part for field in fields for part in str(getattr(node, field)).split(".")}
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 100:
        return set(re.findall(r"[A-Za-z_][\w-]*", node.value))
    return set()


def dead_names(text: str) -> Iterator[str]:
    """Identifiers between backticks that nothing is called, and modules that are not there."""
    for span in spans(text):
        if any(sign in span for sign in "=<>/\\*$%{") or span.startswith(("-", "mist ", "make ")):
            continue
        for word in re.split(r"[\s,()\[\]]+", span):
            if not NAME.fullmatch(word) or word.endswith("_") or word in FOREIGN:
                continue
            if "_" not in word and not word.startswith("mist."):
                continue
            if not (set(word.split(".")[-1:]) <= known_names()) or not module_exists(word):
                yield word


def module_exists(word: str) -> bool:
    """Whether a dotted name of ours begins with modules that exist."""
    parts = word.split(".")
    if parts[0] != "mist" or len(parts) == 1:
        return True
    first = ROOT / "mist" / parts[1]
    return first.is_dir() or first.with_suffix(".py").exists() or parts[1] in known_names()


def dead_files(text: str) -> Iterator[str]:
    """Paths into our folders that do not exist."""
    for span in spans(text):
        for path in FILE.findall(span.split("::")[0]):
            placeholder = "*" in span or re.search(r"[A-Z]{3}", path) or path in ELSEWHERE
            if not (ROOT / path).exists() and not placeholder:
                yield path


@cache
def options() -> dict[str, frozenset[str]]:
    """The options of every command."""
    group = typer.main.get_command(app)
    return {
        name: frozenset(
            option
            for each in command.params
            for option in (*each.opts, *each.secondary_opts)
            if option.startswith("--")
        )
        | {"--help"}
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }


def dead_options(text: str) -> Iterator[str]:
    """Commands that do not exist, and options that their command does not have."""
    for line in text.splitlines():
        code = [line] if line.startswith(("    ", "$ ")) else spans(line)
        for piece in code:
            for name, rest in COMMAND.findall(piece):
                if name not in options():
                    yield f"mist {name}"
                    continue
                yield from (
                    f"mist {name} {option}"
                    for option in OPTION.findall(rest)
                    if option not in options()[name]
                )


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_names_what_exists(name: str) -> None:
    text = (ROOT / name).read_text()
    dead = {*dead_names(text), *dead_files(text), *dead_options(text)}
    assert not dead


def test_the_concepts_show_every_room_and_module() -> None:
    text = (ROOT / "docs" / "concepts.md").read_text()
    here = sorted((ROOT / "mist").iterdir())
    rooms = [f"mist/{path.name}/" for path in here if (path / "__init__.py").exists()]
    modules = [f"mist/{path.name}" for path in here if path.suffix == ".py"]
    assert not [name for name in (*rooms, *modules) if f"`{name}`" not in text]


def test_words_are_defined_once() -> None:
    words = re.findall(r"(?m)^\*\*([^*]+)\*\*:", (ROOT / "docs" / "concepts.md").read_text())
    assert len(words) > 20
    assert sorted(set(words)) == sorted(words)


def test_dead_names_are_found() -> None:
    text = "`_no_such_function` `mist.nowhere.thing_of` `mist/nowhere.py` `mist plan --no-such`"
    assert set(dead_names(text)) == {"_no_such_function", "mist.nowhere.thing_of"}
    assert list(dead_files(text)) == ["mist/nowhere.py"]
    assert list(dead_options(text)) == ["mist plan --no-such"]
    assert list(dead_options("    mist fly PLAN")) == ["mist fly"]
