"""YAML and JSON that anyone may have written: read within limits, and refused in our words.

Plans, profiles, calibrations, logs and configurations come through here, so that whatever a parser
raises, and whatever makes one run long, is met in one place. A document has at most
`mist.files.MOST_BYTES` (YAML: `MOST_YAML_BYTES`), `MOST_NODES` values of YAML with every alias
written out, and `MOST_DEPTH` levels; its keys are text, and its whole numbers lie within 64 bits.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from mist.errors import InputError
from mist.files import read_bytes
from mist.units import LARGEST_INTEGER, MIB

if TYPE_CHECKING:
    import yaml

MOST_YAML_BYTES: Final = 4 * MIB  # a plan of a thousand stages has one
MOST_NODES: Final = 200_000
MOST_DEPTH: Final = 64
KIND: Final = re.compile(r"mist\.([a-z]+)/[0-9]+$")  # the schema line of a file

Refusal = type[InputError]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """The mapping in a YAML file, and paths of keys that it gives twice (the last one holds)."""

    data: Mapping[str, object]
    repeated: tuple[str, ...]


def read_json(path: Path, refusal: Refusal = InputError, *, is_finite: bool = True) -> object:
    """What a JSON file holds; `is_finite`: refuse NaN and infinities, which are no JSON.

    Raises `refusal` for a file that cannot be read or is beyond limits.
    """
    return parse_json(read_bytes(path, refusal), path, refusal, is_finite=is_finite)


def parse_json(
    content: bytes, path: Path, refusal: Refusal = InputError, *, is_finite: bool = True
) -> object:
    """What bytes of JSON say, of the file at `path`. Raises `refusal` as `read_json`."""
    text = text_of(content, path, refusal)
    with _in_our_words(path, "valid JSON", refusal):
        data = json.loads(text)
        _check_values(data, is_finite=is_finite)
    return data


def read_text(path: Path, refusal: Refusal = InputError) -> str:
    """The text of a file in UTF-8, without a byte order mark. Raises `refusal`."""
    return text_of(read_bytes(path, refusal), path, refusal)


def text_of(content: bytes, path: Path, refusal: Refusal = InputError) -> str:
    """Bytes of a file as text. Raises `refusal`."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise refusal(f"{path} cannot be read: it is not text in UTF-8.") from error


def parse_yaml(content: bytes, path: Path, refusal: Refusal = InputError) -> object:
    """What the one document in a YAML file holds: a `Document`, or something else than a mapping.

    Raises `refusal`, naming the path, for what is no YAML, or is beyond limits.
    """
    if len(content) > MOST_YAML_BYTES:
        raise refusal(f"{path} has more than {MOST_YAML_BYTES // MIB} MiB, too much for YAML.")
    text = text_of(content, path, refusal)
    with _in_our_words(path, "YAML", refusal):
        _check_size(text)
        loader = _loader()(text)
        node = loader.get_single_node()
        data = loader.construct_document(node) if node else None
        _check_values(data, is_finite=False)  # of numbers the schemas say more
        if not isinstance(data, dict):
            return data
        return Document(data=data, repeated=tuple(_repeated_keys(node, "")))


def refuse_other_kind(
    data: Mapping[str, object], schema: str, path: Path, refusal: Refusal = InputError
) -> None:
    """Raise `refusal` for a whole file of another kind: a list of all its keys would say less.

    `schema`: of the kind that is asked for ("mist.plan/1"); another version of it is no other kind.
    """
    found, asked = KIND.match(str(data.get("schema"))), KIND.match(schema)
    if found and asked and found[1] != asked[1]:
        raise refusal(
            f"{path} is the file of a {found[1]} ({found[0]}), where that of a {asked[1]} "
            f"({schema}) is asked for."
        )


@contextmanager
def _in_our_words(path: Path, kind: str, refusal: Refusal) -> Iterator[None]:
    """Turn whatever a parser raises into a refusal."""
    import yaml

    try:
        yield
    except RecursionError as error:
        raise refusal(f"{path} is not {kind}: it is nested too deeply.") from error
    except MemoryError as error:
        raise refusal(f"{path} is too large for the memory of this machine.") from error
    except (yaml.YAMLError, json.JSONDecodeError, _BeyondLimits) as error:
        raise refusal(f"{path} is not {kind}: {error}.") from error
    # PyYAML's constructors let through what int(), float(), datetime and their own tables raise.
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        words = "a value does not fit its tag, or has thousands of digits"
        raise refusal(f"{path} is not {kind}: {words} ({error}).") from error


class _BeyondLimits(Exception):
    """A document that Mist does not read, though a parser would."""


def _check_size(text: str) -> None:
    """Refuse, before anything is built, YAML that is deep, or large once its aliases are written.

    A few lines of aliases to aliases stand for billions of values: here each counts as all it
    stands for, which is known when its anchor has been closed.
    """
    import yaml

    sizes: dict[str, int] = {}
    unclosed: list[tuple[str | None, int]] = [(None, 0)]  # anchor, and values up to now
    for event in yaml.parse(text, Loader=_loader()):
        anchor, size = getattr(event, "anchor", None), 0
        if isinstance(event, yaml.CollectionStartEvent):
            unclosed.append((anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = unclosed.pop()
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == above for above, _ in unclosed):
                raise _BeyondLimits(f"*{anchor} contains itself")
            anchor, size = None, sizes.get(str(anchor), 1)  # the parser refuses an unknown one
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
        if anchor is not None:
            sizes[anchor] = size
        above, before = unclosed[-1]
        unclosed[-1] = above, before + size
        if before + size > MOST_NODES:
            raise _BeyondLimits(f"it stands for more than {MOST_NODES:,} values")
        if len(unclosed) > MOST_DEPTH + 1:
            raise _BeyondLimits("it is nested too deeply")


# JSON and YAML can escape halves of a pair of UTF-16, which no output can write.
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def _check_values(data: object, *, is_finite: bool) -> None:
    """Refuse values that nothing behind can take: see the head of this file."""
    level: list[tuple[str, object]] = [("", data)]
    for _ in range(MOST_DEPTH):
        for path, value in level:
            if words := _value_fault(value, is_finite=is_finite):
                raise _BeyondLimits(f"{path or 'it'} {words}")
        level = [item for path, value in level for item in _items(path, value)]
        if not level:
            return
    raise _BeyondLimits("it is nested too deeply")


def _value_fault(value: object, *, is_finite: bool) -> str:
    """What is wrong with a value, "" for a good one."""
    # Never with the value itself: Python refuses to print an integer of thousands of digits.
    if type(value) is int and abs(value) > LARGEST_INTEGER:
        return "is a number beyond 64 bits"
    if type(value) is float and is_finite and not math.isfinite(value):
        return f"is {value}, no finite number"
    if type(value) is str and _SURROGATE.search(value):
        return "holds half of a surrogate pair"
    return ""


def _items(path: str, value: object) -> Iterator[tuple[str, object]]:
    """The values of a collection, each with its path."""
    if type(value) is list:
        for index, item in enumerate(value):
            yield f"{path}[{index}]", item
    elif type(value) is dict:
        for key, item in value.items():
            if type(key) is not str or _SURROGATE.search(key):
                raise _BeyondLimits(f"a key of {path or 'the file'} is no text: {key!r:.40}")
            yield (f"{path}.{key}" if path else key), item


def _repeated_keys(node: "yaml.Node", path: str) -> Iterator[str]:
    """Every key that a mapping at or below this node has twice; `_check_size` saw to its size."""
    import yaml

    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _repeated_keys(item, f"{path}[{index}]")
    elif isinstance(node, yaml.MappingNode):
        known: set[str] = set()
        for key, value in node.value:
            here = f"{path}.{key.value}".lstrip(".")
            if here in known:
                yield here
            known.add(here)
            yield from _repeated_keys(value, here)


@cache
def _loader() -> Any:  # noqa: ANN401 - PyYAML with its C library, or without
    """A loader of what JSON can say: no bytes, sets or pairs, and a date is text."""
    import yaml

    # The C library is much faster; builds of PyYAML without it have the Python one.
    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    loader: Any = type("JsonLikeLoader", (base,), {})
    loader.add_constructor("tag:yaml.org,2002:timestamp", lambda _, node: str(node.value))
    for kind in ("binary", "set", "omap", "pairs"):
        loader.add_constructor(f"tag:yaml.org,2002:{kind}", _refuse)
    return loader


def _refuse(_: object, node: "yaml.Node") -> NoReturn:
    import yaml

    message = f"a file of Mist holds no {node.tag.rpartition(':')[2]}"
    raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
