"""In which line of a file a setting stands."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping

from mist.errors import InputError
from mist.export.target import Configuration


def line_of(name: str, text: str) -> int | None:
    """The last line of a text that sets something of this name; None without one.

    A dotted name stands in one line, or its last part behind the lines of its sections; an option
    may have dashes.
    """
    option = f"--{name}"
    for word in (name, option, option.replace("_", "-")):
        if places := _lines_with(word, text):
            return places[-1]
    *sections, last = name.split(".")
    begin, behind = 0, False
    for section in sections:
        if later := [place for place in _lines_with(section, text) if place > begin]:
            begin, behind = later[0], True
    # One line may hold a section and its keys, as in JSON.
    places = [place for place in _lines_with(last, text) if place >= begin]
    return places[0 if behind else -1] if places else None


def _lines_with(word: str, text: str) -> list[int]:
    """Numbers of the lines that have a word before their comment."""
    whole = re.compile(rf"(?<![\w-]){re.escape(word)}(?![\w-])")
    lines = enumerate(text.splitlines(), start=1)
    return [number for number, line in lines if whole.search(line.split("#")[0])]


def options_in(message: str, options: Iterable[str]) -> set[str]:
    """Which options of `mist check`, named with _, a message names: "--tp 4", "tp 4", "ZeRO-2"."""
    return {option for option in options if _names(message, option.replace("_", "[-_ ]"))}


def _names(message: str, spelled: str) -> bool:
    return bool(re.search(rf"(?i)(--{spelled}\b|(?<![\w-]){spelled}[ -](\d|of \d))", message))


def settings_words(options: Collection[str], names: Mapping[str, str], text: str) -> str:
    """What a file says for these options and where: "tp_size in line 4"; "" for nothing.

    `names`: of settings, each with the option that it answers.
    """
    lines = {name: line_of(name, text) for name, option in names.items() if option in options}
    return ", ".join(f"{name} in line {line}" for name, line in lines.items() if line)


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
