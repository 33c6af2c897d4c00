"""In which line of a file a setting stands."""

import re
from collections.abc import Callable

from mist.errors import InputError
from mist.export.target import Configuration


def line_of(name: str, text: str) -> int | None:
    """The last line of a text that sets something of this name; None without one.

    Of a dotted name the last part stands in the line, of an option its dashes, too.
    """
    option = f"--{name}"
    for word in (name, name.rpartition(".")[2], option, option.replace("_", "-")):
        own = re.compile(rf"(?<![\w-]){re.escape(word)}(?![\w-])")
        lines = enumerate(text.splitlines(), start=1)
        if places := [number for number, line in lines if own.search(line.split("#")[0])]:
            return places[-1]
    return None


def place_of(name: str, text: str, path: str) -> str:
    """The file, and the line where it is known."""
    line = line_of(name, text)
    return f"{path}, line {line}" if line else path


def read_lines(read: Callable[[str, str], Configuration], text: str, path: str) -> Configuration:
    """What `read` makes of a text at `path`; its InputError with the line of the setting."""
    try:
        return read(text, path)
    except InputError as error:
        raise InputError(with_line(str(error), text, path)) from error


def with_line(message: str, text: str, path: str) -> str:
    """A message about a file that begins with a setting of it, with the line of the setting."""
    about = f"{path}: "
    if not message.startswith(about):
        return message
    said = message.removeprefix(about)
    return f"{place_of(said.split(maxsplit=1)[0], text, path)}: {said}"
