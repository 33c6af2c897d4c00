"""Files that appear whole or not at all, and digests of what they depend on."""

import hashlib
import json
import os
import tempfile
from pathlib import Path

from mist.errors import OutputError


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
