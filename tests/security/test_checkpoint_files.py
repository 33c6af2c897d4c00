"""A checkpoint that somebody else wrote is data: no file of it runs code, or names another folder.

The bombs that are read here go off in torch's own reader: the first test shows it.
"""

import io
import pickle
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from mist.exec.run.tensor_reader import TensorReader
from tests.security.canary import Bomb, check_bombs, pickled, went_off

Harm = Callable[[Path, Path], None]

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, of one process without a group


def test_the_bombs_work(tmp_path: Path) -> None:
    check_bombs(tmp_path / "canary")


def state() -> dict[str, torch.Tensor]:
    return {
        "w": torch.arange(6.0).reshape(2, 3),
        "n": torch.tensor(3),
        "h": torch.ones(2).bfloat16(),
    }


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "step-1"
    dcp.save(state(), checkpoint_id=folder, no_dist=True)
    return folder


def read(folder: Path, reader: type[FileSystemReader] = TensorReader) -> dict[str, torch.Tensor]:
    values = {name: torch.zeros_like(value) for name, value in state().items()}
    dcp.load(values, storage_reader=reader(folder), no_dist=True)
    return values


def test_a_checkpoint_is_read(checkpoint: Path) -> None:
    values = read(checkpoint)
    assert all(torch.equal(values[name], value) for name, value in state().items())


def edit(folder: Path, change: Callable[[Metadata], object]) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(change(index)))


def a_pickle(folder: Path, canary: Path) -> None:
    (folder / ".metadata").write_bytes(pickled(canary))


def a_field_of_the_index(folder: Path, canary: Path) -> None:
    edit(folder, lambda index: replace(index, planner_data=Bomb(canary)))


def bytes_for_a_tensor(folder: Path, canary: Path) -> None:
    """Where the index says bytes, torch unpickles the file whole."""
    (folder / "__0_0.distcp").write_bytes(as_torch_saves(Bomb(canary)))

    def change(index: Metadata) -> Metadata:
        places = {
            replace(key, offset=None): replace(place, offset=0, length=10**6)
            for key, place in index.storage_data.items()
        }
        kinds = dict.fromkeys(index.state_dict_metadata, BytesStorageMetadata())
        return replace(index, state_dict_metadata=kinds, storage_data=places)

    edit(folder, change)


def as_torch_saves(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


HARM: dict[str, Harm] = {
    "a pickle for the index": a_pickle,
    "a field of the index": a_field_of_the_index,
    "bytes for a tensor": bytes_for_a_tensor,
}


@pytest.mark.parametrize("name", HARM)
def test_a_checkpoint_runs_no_code(checkpoint: Path, tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    HARM[name](checkpoint, canary)
    with pytest.raises(dcp.CheckpointException, match="no part of an index"):
        read(checkpoint)
    assert not went_off(canary)
    with suppress(dcp.CheckpointException):
        read(checkpoint, FileSystemReader)
    assert went_off(canary), "the bomb is none, so that this test shows nothing"


def test_a_tensor_file_runs_no_code(checkpoint: Path, tmp_path: Path) -> None:
    """Torch reads tensors with weights_only: this holds it to that."""
    canary = tmp_path / "canary"
    (file,) = checkpoint.glob("*.distcp")
    file.write_bytes(as_torch_saves(Bomb(canary)))

    def change(index: Metadata) -> Metadata:
        places = {k: replace(p, offset=0, length=10**6) for k, p in index.storage_data.items()}
        return replace(index, storage_data=places)

    edit(checkpoint, change)
    with pytest.raises(dcp.CheckpointException):
        read(checkpoint)
    assert not went_off(canary)


@pytest.mark.parametrize("place", ["../elsewhere", "/etc/hostname", "a/b", "..", ""])
def test_a_checkpoint_names_no_file_elsewhere(checkpoint: Path, place: str) -> None:
    def change(index: Metadata) -> Metadata:
        places = {k: replace(p, relative_path=place) for k, p in index.storage_data.items()}
        return replace(index, storage_data=places)

    edit(checkpoint, change)
    with pytest.raises(dcp.CheckpointException, match="files beside it"):
        read(checkpoint)
