"""The options in a command line, a script or a file of arguments, read as text and never run.

Assignments (NAME=value) are put in where a later word says $NAME, ${NAME} or ${NAME:-value}.
Options in a value that no word says are read, too. Other names stay as they are. Comments go. An
option has the values up to the next one.
"""

import re
import shlex
from collections.abc import Mapping, Sequence

from mist.errors import InputError

ASSIGNMENT = re.compile(
    r"""(?m)^[ \t]*(?:export[ \t]+)?([A-Za-z_]\w*)="""
    r"""((?:"[^"]*"|'[^']*'|\$\{[^}\n]*\}|[^\s(;#"'])*)[ \t]*(?:[;#].*)?$"""
)
VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^}]*))?\}|(\w+))")
OPTION = re.compile(r"--[A-Za-z][\w.-]*(?:=.*)?", re.DOTALL)
ONE_LINE = re.compile(r"(?m)^[ \t]*\w+\+?=\(([^()\n]*)\)[ \t]*$")  # an array
MOST_CHARACTERS = 2**20

Options = Mapping[str, Sequence[str]]


def options_of(text: str, path: str) -> dict[str, tuple[str, ...]]:
    """Each option with its values, the last of several. Raises InputError for what is no text."""
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"{path} has more than {MOST_CHARACTERS:,} characters, too much to read.")
    known: dict[str, str] = {}
    for name, value in ASSIGNMENT.findall(text):
        known[name] = _filled(value.strip("\"'"), known).strip("\"'")
    joined = re.sub(r"\\\n", " ", ASSIGNMENT.sub(" ", text))
    joined = ONE_LINE.sub(r"\1", joined)
    try:
        # Arrays and substitutions stand between brackets, which are no part of a word.
        words = shlex.split(re.sub(r"(?m)^[^#\n'\"]*=\(|^\s*\)\s*$", " ", joined), comments=True)
    except ValueError as error:
        raise InputError(f"{path} is no list of options: {str(error).lower()}.") from error
    unsaid = [name for name in known if not re.search(rf"\$\{{?{name}\b", joined)]
    words = [*(f"${name}" for name in unsaid), *words]
    return _grouped([one for word in words for one in _split(word, known)])


def _split(word: str, known: Mapping[str, str]) -> list[str]:
    """The words of one that a variable or quotes made of several options, as a shell has them."""
    text = re.sub(r"\\\n", " ", _filled(word, known))
    # A command may stand before the options of a variable; in quotes that would be a sentence.
    before = ".*" if VARIABLE.fullmatch(word) else ""
    if not re.match(rf"{before}\s*--[A-Za-z]", text, re.DOTALL) or not re.search(
        r"\s", text.strip()
    ):
        return [text]
    try:
        return shlex.split(text, comments=True)
    except ValueError:
        return [text]


def _filled(word: str, known: Mapping[str, str]) -> str:
    def value(found: re.Match[str]) -> str:
        name = found[1] or found[3]
        return known.get(name, found[2] if found[2] is not None else found[0])

    return VARIABLE.sub(value, word)


def _grouped(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    options: dict[str, tuple[str, ...]] = {}
    name = ""
    for word in words:
        if OPTION.fullmatch(word):
            name, equals, value = word.partition("=")
            options[name] = (value,) if equals else ()
        # A variable that is not known, behind a value, may be other options.
        elif name and not (options[name] and VARIABLE.fullmatch(word)):
            options[name] += (word,)
    return options


def number(options: Options, name: str, path: str, default: int | None = None) -> int | None:
    """The whole number of an option. Raises InputError naming file and option."""
    values = options.get(name)
    if values is None:
        return default
    if len(values) < 1 or not re.fullmatch(r"-?\d{1,18}", values[0]):
        found = values[0] if values else "nothing"
        raise InputError(f"{path}: {name} {found} is no whole number.")
    return int(values[0])


def launched(options: Options) -> int | None:
    """Processes that a launcher starts: of torchrun on all nodes, or of accelerate in all."""
    # What follows a number is the program that is started.
    said = {name.replace("_", "-"): values[0] for name, values in options.items() if values}
    if re.fullmatch(r"\d{1,6}", said.get("--num-processes", "")):
        return int(said["--num-processes"]) or None
    each, nodes = said.get("--nproc-per-node", ""), said.get("--nnodes", "1")
    if re.fullmatch(r"\d{1,6}", each) and re.fullmatch(r"\d{1,6}", nodes):
        return int(each) * int(nodes) or None
    return None
