"""Weights in a folder, as Hugging Face writes them: model.safetensors, or shards and their index.

What such files say of themselves is read here, without torch and without their tensors: a file is
the length of its header (8 bytes), the header (JSON: of each tensor dtype, shape and place), bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from mist.documents import parse_json, read_json
from mist.errors import InputError
from mist.files import is_file, is_folder
from mist.trace.models.source import PythonSource, resolve

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
PICKLES: Final = ("pytorch_model*.bin", "consolidated*.pth")  # unpickling one runs code
DTYPE_BYTES: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
MAX_HEADER_BYTES: Final = 100_000_000  # what safetensors itself allows
INSTEAD: Final = "or start from the seed with --from-scratch"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor in a file; `dtype` as safetensors writes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def folder_beside(source: str) -> Path | None:
    """The folder of the config.json that a model comes from, if the folder has weights.

    Raises InputError when they are there in a form that is not read.
    """
    model_source = resolve(source)
    config = Path(model_source.label)
    if isinstance(model_source, PythonSource) or config.name != "config.json":
        return None
    folder = config.parent
    return folder if _readable(folder) or _others(folder) else None


def check(folder: Path) -> None:
    """Raise InputError unless a folder has weights whose files are whole. Reads headers only."""
    if not is_folder(folder):
        raise InputError(f"--weights {folder} is no folder. Give one with {SINGLE} in it.")
    tensors_of(folder)


def tensors_of(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor in a folder's weights, by its name there. Raises InputError."""
    if not _readable(folder):
        other_files = _others(folder)
        content = "no weights"
        if other_files:
            content = f"only {', '.join(other_files)}, which Mist does not read"
        raise InputError(
            f"{folder} has {content}. Save the model again (save_pretrained writes {SINGLE}), "
            f"{INSTEAD}."
        )
    if is_file(folder / SINGLE):
        return _header(folder / SINGLE)
    places = _index(folder / INDEX)
    tensors = {
        name: t for file in sorted(set(places.values())) for name, t in _header(file).items()
    }
    lacking = [f"{name} ({places[name].name})" for name in places if name not in tensors]
    if lacking:
        raise InputError(
            f"{folder / INDEX} names tensors that their files do not have: {some(lacking)}. "
            f"Download the folder again, {INSTEAD}."
        )
    return tensors


def some(names: list[str], count: int = 5) -> str:
    """The first few names of a list."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(sorted(names)[:count]) + more


def _readable(folder: Path) -> bool:
    return is_file(folder / SINGLE) or is_file(folder / INDEX)


def _others(folder: Path) -> list[str]:
    """Files of weights under other names, or in other forms."""
    return sorted({p.name for each in ("*.safetensors", *PICKLES) for p in folder.glob(each)})


def _index(path: Path) -> dict[str, Path]:
    """The file of each tensor."""
    try:
        index: Any = read_json(path)
        places = index["weight_map"]
        files = {str(name): path.parent / str(file) for name, file in places.items()}
    except (InputError, KeyError, AttributeError, TypeError) as error:
        raise InputError(
            f"{path} is no index of weights: {error}. Download it again, {INSTEAD}."
        ) from error
    if missing := sorted({file.name for file in files.values() if not is_file(file)}):
        raise InputError(
            f"{path.parent} lacks {some(missing)}, which {INDEX} names. Download the rest, "
            f"{INSTEAD}."
        )
    return files


def _header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file. Raises InputError when it is cut short or no such file."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 0 < size <= MAX_HEADER_BYTES:
                raise ValueError("its header has no length")
            rows: Any = parse_json(file.read(size), path)
        rows.pop("__metadata__", None)
        tensors = {name: _tensor(path, row) for name, row in rows.items()}
        ends = [int(row["data_offsets"][1]) for row in rows.values()]
    except (InputError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is no safetensors file: {error}. Download it again, {INSTEAD}."
        ) from error
    # Offsets in a header count from its end.
    expected_bytes, num_bytes = 8 + size + max(ends, default=0), path.stat().st_size
    if num_bytes != expected_bytes:
        raise InputError(
            f"{path} has {num_bytes:,} bytes, its header says {expected_bytes:,}: it is cut short "
            f"or damaged. Download it again, {INSTEAD}."
        )
    return tensors


def _tensor(path: Path, row: Mapping[str, Any]) -> StoredTensor:
    shape = tuple(int(size) for size in row["shape"])
    first, last = row["data_offsets"]
    item_bytes = DTYPE_BYTES.get(row["dtype"])
    if item_bytes is not None and last - first != prod(shape) * item_bytes:
        raise ValueError(f"a tensor of shape {list(shape)} has {last - first} bytes")
    return StoredTensor(file=path, dtype=str(row["dtype"]), shape=shape)
