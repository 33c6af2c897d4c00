"""Only temporary folders of Mist's go with the process that made them."""

import tempfile
from pathlib import Path

import pytest

from mist.exec.parent_watch import PREFIX, remove_temporary


@pytest.mark.parametrize(
    ("name", "goes"), [(f"{PREFIX}a1", True), ("other", False), (f"inner/{PREFIX}a1", False)]
)
def test_only_a_temporary_folder_of_mist_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, *, goes: bool
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / name
    folder.mkdir(parents=True)
    (folder / "rendezvous").touch()
    remove_temporary(folder)
    assert folder.exists() != goes
    assert tmp_path.exists()
