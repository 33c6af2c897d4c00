"""Documents name what exists, are up to date where generated, and have short sentences."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import typer.main
import yaml

from mist.cli.common import app
from tests import make_docs

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "docs/decisions/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"  # it tells what was
)
# Decisions stay as they were taken; the words of docs/cli.md are those of the commands.
PROSE = [name for name in DOCUMENTS if "docs/decisions/" not in name and name != "docs/cli.md"]
# Paths that a document says are not, or are elsewhere.
ELSEWHERE = frozenset({"mist/plan.py", "mist/traces", "mist/export/"})
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

# Files of a user, of torch, or that a document says are gone.
FOREIGN_FILES = frozenset(
    {"net.py", "mist/plan.py", "_fsdp_param_group.py", "_functional_collectives.py"}
)
# Keys of a pyproject.toml, keys of a plan that golden plans lack.
FOREIGN_PAIRS = frozenset(
    {("tool", "importlinter"), ("importlinter", "contracts"), ("search", "refined")}
)

MAX_README_WORDS = 900
MAX_SENTENCE_WORDS = 40
TICS = ("but with", "as good as none", "told", "beside", "away", "of equals")

SPAN = re.compile(r"`([^`\n]+)`")
FILE = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*[\w/]")
NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
PYTHON_FILE = re.compile(r"[\w./-]*\w\.py")
DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
SUFFIXES = frozenset({"py", "yaml", "md", "json", "png", "svg", "txt", "npy", "toml", "csv", "log"})
SUFFIXES |= {"safetensors", "rst"}
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
def known_pairs() -> frozenset[tuple[str, str]]:
    """Every "a.b" that is so: of module and member, class and member, folder and module, keys."""
    found: set[tuple[str, str]] = set()
    for folder in ("mist", "tests", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            file = path.parent if path.name == "__init__.py" else path
            found.add((file.parent.name, file.stem))
            tree = ast.parse(path.read_text())
            found |= {(file.stem, name) for node in tree.body for name in members_of(node)}
            for node in ast.walk(tree):
                found |= pairs_of(node)
    for path in [*(ROOT / "profiles").rglob("*.yaml"), *(ROOT / "plans").glob("*.yaml")]:
        found |= set(key_pairs("", yaml.safe_load(path.read_text())))
    return frozenset(found)


def pairs_of(node: ast.AST) -> set[tuple[str, str]]:
    """Class and member, or an attribute and what it is taken from."""
    match node:
        case ast.ClassDef(name=name, body=body):
            return {(name, member) for each in body for member in members_of(each)}
        case ast.Attribute(value=ast.Name(id=name) | ast.Attribute(attr=name), attr=attribute):
            return {(name, attribute)}
    return set()


def members_of(node: ast.stmt) -> set[str]:
    """The names that one statement of a module or class defines or imports."""
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.Assign(targets=targets):
            return {each.id for each in targets if isinstance(each, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return {each.asname or each.name for each in names}
    return set()


def key_pairs(name: str, value: object) -> Iterator[tuple[str, str]]:
    """Keys of a YAML file with the key that they stand under."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield name, str(key)
            yield from key_pairs(str(key), inner)
    if isinstance(value, list):
        for inner in value:
            yield from key_pairs(name, inner)


def without_blocks(text: str) -> str:
    """A document without its fenced blocks and comments."""
    return re.sub(r"(?ms)^```.*?^```$|<!--.*?-->", "", text)


def words_of_spans(text: str) -> Iterator[str]:
    for span in spans(without_blocks(text)):
        yield from re.split(r"[\s,()\[\]]+", span.split("::")[0])


def dead_python_files(text: str) -> Iterator[str]:
    """Files of Python, with or without their folders, that do not exist."""
    paths = [f"/{path.relative_to(ROOT)}" for path in ROOT.rglob("*.py")]
    for word in words_of_spans(text):
        ours = PYTHON_FILE.fullmatch(word) and word not in FOREIGN_FILES
        if ours and not any(path.endswith(f"/{word}") for path in paths):
            yield word


def dead_members(text: str) -> Iterator[str]:
    """Names like `module.function` or `Class.field` of which a part does not have the next."""
    for word in words_of_spans(text):
        parts = word.split(".")
        if not DOTTED.fullmatch(word) or parts[-1] in SUFFIXES or parts[0] in {"torch", "nn"}:
            continue
        if not set(pairwise(parts)) <= known_pairs() | FOREIGN_PAIRS:
            yield word


def anchors(path: Path) -> set[str]:
    """The headings of a document as links name them."""
    headings = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?ms)^```.*?^```$", "", path.read_text()))
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def dead_links(text: str, folder: Path) -> Iterator[str]:
    """Links to files, pictures and headings of ours that are not there."""
    for link in re.findall(r"\]\(([^()\s]+)\)", text):
        name, _, anchor = link.partition("#")
        path = folder / name
        if "://" in link or (not name and not anchor):
            continue
        if not path.exists() or (anchor and path.is_file() and anchor not in anchors(path)):
            yield link


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
    dead |= {*dead_python_files(text), *dead_members(text)}
    assert not dead


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_links_to_what_exists(name: str) -> None:
    path = ROOT / name
    text = path.read_text().replace("](#", f"]({path.name}#")
    assert not list(dead_links(text, path.parent))


def test_every_module_stands_once_in_the_tree() -> None:
    shown = re.findall(r"(?m)^ *(\w+\.py) ", make_docs.tree())
    there = [path.name for path in (ROOT / "mist").rglob("*.py") if path.name != "__init__.py"]
    assert sorted(shown) == sorted([*there, "__init__.py"])


@pytest.mark.parametrize("page", [make_docs.CONCEPTS, make_docs.EXTENDING])
def test_generated_blocks_are_as_they_should_be(page: Path) -> None:
    text = page.read_text()
    assert make_docs.with_blocks(text) == text, "run `make docs`"


def test_the_page_of_commands_is_that_of_the_commands() -> None:
    assert make_docs.CLI.read_text() == make_docs.cli_page(), "run `make docs`"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= MAX_README_WORDS


def test_words_are_defined_once() -> None:
    words = re.findall(
        r"\*\*([A-Za-z][^*\n]*)\*\*", make_docs.CONCEPTS.read_text().split("## Words")[1]
    )
    assert len(words) > 60
    assert sorted(set(words)) == sorted(words)


def paragraphs(text: str) -> Iterator[str]:
    """Prose: no code, tables, headings or pictures. A point of a list is a paragraph."""
    lines: list[str] = []
    for line in [*without_blocks(text).splitlines(), ""]:
        point = re.match(r" {0,3}(?:[-*]|\d+\.) +(.*)", line)
        ends = not line.strip() or line.startswith(("|", "#", "    ", "!["))
        if (ends or point) and lines:
            yield " ".join(lines)
            lines = []
        if not ends:
            lines.append(point[1] if point else line.strip())


def sentences(text: str) -> Iterator[str]:
    """The sentences of the prose, with links as their text."""
    for paragraph in paragraphs(text):
        plain = re.sub(r"\]\([^)]*\)", "]", paragraph)
        yield from re.split(r"(?<=[.!?])[)\"*]*\s+(?=[\"`*\[(]*[A-Z0-9`\[])", plain)


def long_sentences(text: str) -> Iterator[str]:
    """Sentences of more words than a reader keeps in mind."""
    for sentence in sentences(text):
        if sum(any(sign.isalnum() for sign in word) for word in sentence.split()) > (
            MAX_SENTENCE_WORDS
        ):
            yield sentence


def tics(text: str) -> Iterator[str]:
    """Turns of phrase that a reader stumbles over, outside of code and of links' addresses."""
    plain = re.sub(r"\]\([^)]*\)|`[^`\n]*`|(?m:^    .*$)", "", without_blocks(text))
    for tic in TICS:
        if re.search(rf"(?i)\b{tic}\b", plain):
            yield tic


@pytest.mark.parametrize("name", PROSE)
def test_a_document_has_short_sentences(name: str) -> None:
    assert not list(long_sentences((ROOT / name).read_text()))


@pytest.mark.parametrize("name", PROSE)
def test_a_document_has_no_tics(name: str) -> None:
    assert not list(tics((ROOT / name).read_text()))


def test_long_sentences_and_tics_are_found() -> None:
    long = " ".join(["word"] * 41)
    text = f"# {long}\n\n| {long} |\n\n    {long}\n\nShort. W{long[1:]}.\n\n- {long[5:]}.\n"
    assert list(long_sentences(text)) == [f"W{long[1:]}."]
    assert list(tics("It lies beside. `told` [a](away.md)\n\n    of equals\n")) == ["beside"]


def test_dead_names_are_found() -> None:
    text = "`_no_such_function` `mist.nowhere.thing_of` `mist/nowhere.py` `mist plan --no-such`"
    assert set(dead_names(text)) == {"_no_such_function", "mist.nowhere.thing_of"}
    assert list(dead_files(text)) == ["mist/nowhere.py"]
    assert list(dead_options(text)) == ["mist plan --no-such"]
    assert list(dead_options("    mist fly PLAN")) == ["mist fly"]
    links = "[a](nowhere.md) [b](README.md#nowhere) [c](README.md#limits) [d](https://x.y/z)"
    assert list(dead_links(links, ROOT)) == ["nowhere.md", "README.md#nowhere"]
    assert list(dead_python_files("`nowhere.py` `test_docs.py` `mist/trace/flops.py`")) == [
        "nowhere.py",
        "mist/trace/flops.py",
    ]
    assert list(dead_members("`tune.tune` `tune.nowhere` `Plan.stages` `Plan.nowhere`")) == [
        "tune.nowhere",
        "Plan.nowhere",
    ]
