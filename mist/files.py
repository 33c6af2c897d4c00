"""Files: read within a limit, written whole or not at all; entries of the cache; digests.

A name that a user gives may be too long, hold a zero byte or name nobody's home, for which pathlib
raises; `user_path`, `is_file` and `is_folder` answer for every name, as os.path does.

A cache entry is a JSON file that says the digest of its own name and content. It is read where the
folder and the file are this user's and nobody else may write into them: whoever writes an entry
decides what a plan says. An entry that is damaged, or was copied from another, counts as missing.
"""

import hashlib
import json
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Final

from mist.errors import InputError, OutputError
from mist.units import LARGEST_INTEGER, MIB

MOST_BYTES: Final = 64 * MIB  # a log of a hundred thousand steps has as much
PRIVATE: Final = 0o700
ENTRY: Final = re.compile(r'{"sha256":"([0-9a-f]{64})","entry":(.*)}', re.DOTALL)


def user_path(name: str) -> Path:
    """A path as a user types it: a leading ~ is a home folder, where there is one."""
    return Path(os.path.expanduser(name))


def is_file(path: str | Path) -> bool:
    """Whether there is a file of that name, be it a name or not."""
    return os.path.isfile(path)


def is_folder(path: str | Path) -> bool:
    """Whether there is a folder of that name, be it a name or not."""
    return os.path.isdir(path)


def file_beside(path: str, key: str, name: object) -> Path:
    """The file that `key` of the one at `path` names: beside it, or in the current folder.

    Raises InputError where it is in neither.
    """
    places = [folder / str(name) for folder in (Path(path).parent, Path())]
    for file in places:
        if is_file(file):
            return file
    raise InputError(
        f"{path}: {key} {name!r:.80}: {places[0]} is no file. Put it where the key says."
    )


def read_bytes(path: Path, refusal: type[InputError] = InputError) -> bytes:
    """The content of a file. Raises `refusal` when it cannot be read, or is above `MOST_BYTES`."""
    try:
        # Devices and pipes may have no end, and opening a pipe may wait for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise refusal(f"{path} cannot be read: it is no file.")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise refusal(f"{path} cannot be read: {reason_of(error)}.") from error
    if len(content) > MOST_BYTES:
        raise refusal(f"{path} has more than {MOST_BYTES // MIB} MiB, too much for such a file.")
    return content


def reason_of(error: Exception) -> str:
    """Why the system refused, without the number of the error and the path again."""
    return getattr(error, "strerror", None) or str(error)


def write_text(path: Path, text: str) -> None:
    """Write a file through a temporary one in the same folder. Raises OutputError."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file through a temporary one in the same folder. Raises OutputError.

    A link is followed, a file that exists keeps its mode, a new one gets that of the umask.
    """
    try:
        with _whole(Path(os.path.realpath(path))) as file:
            file.write(content)
    except OSError as error:
        raise OutputError(
            f"Cannot write {path}: {error.strerror}. Choose another place."
        ) from error


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` at the end; never that of a device."""
    mode = path.stat().st_mode if path.exists() else None
    if mode is not None and not stat.S_ISREG(mode):
        with path.open("wb") as device:
            yield device
        return
    # Names of files have at most 255 bytes; opened this way, the umask holds.
    name = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}")
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            if mode is not None:
                os.fchmod(handle, stat.S_IMODE(mode))
            yield file
        name.replace(path)
    finally:
        name.unlink(missing_ok=True)


def write_entry(path: Path, text: str) -> None:
    """Keep a cache entry (JSON) in a folder of this user's; a fault of the disk is no fault."""
    with suppress(OSError, OutputError):
        path.parent.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
        if _trusted(path.parent):
            write_text(path, f'{{"sha256":"{digest(path.name, text)}","entry":{text}}}')


def read_entry(path: Path) -> str | None:
    """The text of a cache entry; None where there is none that is whole and this user's."""
    try:
        if not _trusted(path.parent) or path.stat().st_uid != os.geteuid():
            return None
        found = ENTRY.fullmatch(read_bytes(path).decode())
    except (OSError, InputError, UnicodeDecodeError):
        return None
    return found[2] if found and found[1] == digest(path.name, found[2]) else None


def parse_entry(text: str) -> Any:  # noqa: ANN401 - whatever JSON can say
    """What the text of an entry says. Raises ValueError for what Mist never writes there."""
    return json.loads(text, parse_int=_integer)


def _integer(text: str) -> int:
    """A whole number of 64 bits: of more digits, sums fail that are floats elsewhere."""
    value = int(text)
    if abs(value) > LARGEST_INTEGER:
        raise ValueError("a number beyond 64 bits")
    return value


def _trusted(folder: Path) -> bool:
    """Whether only this user writes entries there; if not, one line says so. Raises OSError."""
    found = folder.stat()
    others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX
    if found.st_uid == os.geteuid() and not others:
        return True
    reason = "others may write there" if found.st_uid == os.geteuid() else "it is another user's"
    _say_once(
        f"mist: the cache {folder} is not used: {reason}. Set XDG_CACHE_HOME to a folder of your "
        "own.\n"
    )
    return False


@cache
def _say_once(line: str) -> None:
    sys.stderr.write(line)


def digest(*texts: str) -> str:
    """sha256 of some texts, kept apart."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()
