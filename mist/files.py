"""Files: read within a limit, written whole or not at all; digests of what they depend on.

A name that a user gives may be too long, hold a zero byte or name nobody's home, for which pathlib
raises; `user_path`, `is_file` and `is_folder` answer for every name, as os.path does.
"""

import hashlib
import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Final

from mist.errors import InputError, OutputError
from mist.units import MIB

MOST_BYTES: Final = 64 * MIB  # a log of a hundred thousand steps has as much


def user_path(name: str) -> Path:
    """A path as a user types it: a leading ~ is a home folder, where there is one."""
    return Path(os.path.expanduser(name))


def is_file(path: str | Path) -> bool:
    """Whether there is a file of that name, be it a name or not."""
    return os.path.isfile(path)


def is_folder(path: str | Path) -> bool:
    """Whether there is a folder of that name, be it a name or not."""
    return os.path.isdir(path)


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
    """Write a file through a temporary one in the same folder. Raises OutputError."""
    name = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        raise OutputError(
            f"Cannot write {path}: {error.strerror}. Choose another place."
        ) from error
    finally:
        if name is not None:
            Path(name).unlink(missing_ok=True)


def digest(*texts: str) -> str:
    """sha256 of some texts, kept apart."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()
