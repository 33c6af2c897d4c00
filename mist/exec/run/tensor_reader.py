"""Reads checkpoints of tensors as data: no file of one can run code.

Torch's own reader unpickles the index of a checkpoint (`.metadata`), and the values that the index
calls bytes, without a limit. Here the index may name the classes of the tables and nothing else,
and every value in it is a tensor, which torch reads with weights_only.
"""

import pickle
from pathlib import PurePath, PurePosixPath
from typing import Any, Final

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

# BytesStorageMetadata is not among them: bytes of a checkpoint are pickles that would run.
CLASSES: Final = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        Metadata,
        StorageMeta,
        TensorStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.MetadataIndex,
        metadata.TensorProperties,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
    )
}
WORDS: Final = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    # Of the folder that was written, as text; which module has it depends on Python.
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
    **{
        ("torch", str(each)[6:]): each for each in vars(torch).values() if type(each) is torch.dtype
    },
}


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles the index of a checkpoint, and refuses every word that such an index has not."""

    def find_class(self, module_name: str, global_name: str) -> object:
        """The class of the tables. Raises UnpicklingError."""
        word = (module_name, global_name)
        if word in CLASSES:
            return CLASSES[word]
        if word in WORDS:
            return WORDS[word]
        raise pickle.UnpicklingError(f"{module_name}.{global_name} is no part of an index")


class TensorReader(FileSystemReader):
    """Reads a checkpoint folder whose values are all tensors, in files of that folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ANN401 (torch's own)
        """The index of the checkpoint. Raises UnpicklingError for what is none."""
        path = self._get_metadata_path(kwargs.get("rank"))
        with self.fs.create_stream(path, "rb") as file:
            index = _IndexUnpickler(file).load()
        if not isinstance(index, Metadata) or not _of_tensors(index):
            raise pickle.UnpicklingError("the index is not one of tensors in files beside it")
        index.storage_meta = StorageMeta(load_id=self.load_id)
        return index


def _of_tensors(index: Metadata) -> bool:
    """Whether all values are tensors, in files that are named without a folder."""
    # The file says what lies in the fields, whatever their types are.
    values: object = index.state_dict_metadata
    places: object = index.storage_data
    return (
        isinstance(values, dict)
        and isinstance(places, dict)
        and all(type(value) is TensorStorageMetadata for value in values.values())
        and all(_beside(place) for place in places.values())
    )


def _beside(place: object) -> bool:
    if type(place) is not filesystem._StorageInfo or place.transform_descriptors:
        return False
    name = place.relative_path
    plain = type(name) is str and PurePath(name).name == name
    return plain and name.endswith(filesystem.DEFAULT_SUFFIX)
