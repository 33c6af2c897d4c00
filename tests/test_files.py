"""Files appear whole, where they were asked for, with the mode that the user chose."""

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mist.errors import OutputError
from mist.files import parse_entry, read_entry, write_entry, write_text


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_a_new_file_has_the_mode_of_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "file", "new")
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "file") == mode


def test_a_file_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "file").chmod(0o640)
    write_text(tmp_path / "file", "new")
    assert mode_of(tmp_path / "file") == 0o640
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_written_through(tmp_path: Path, exists: bool) -> None:
    (tmp_path / "sub").mkdir()
    target = tmp_path / "sub" / "target"
    if exists:
        target.write_text("old")
    (tmp_path / "link").symlink_to("sub/target")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert target.read_text() == "new"
    assert {path.name for path in tmp_path.rglob("*")} == {"sub", "target", "link"}


def test_a_device_stays_one(tmp_path: Path) -> None:
    """Root could put a file in the place of /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    end = os.open(tmp_path / "pipe", os.O_RDWR)
    write_text(tmp_path / "pipe", "new")
    assert os.read(end, 100) == b"new"
    os.close(end)
    assert (tmp_path / "pipe").is_fifo()


def test_a_failure_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(os, "fchmod", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write_text(tmp_path / "file", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_reader_sees_one_of_several_writers(tmp_path: Path) -> None:
    """Eight at once, as when jobs begin together on one cache: never a part, never a mixture."""
    path, contents = tmp_path / "entry.json", [json.dumps([i] * 20_000) for i in range(8)]
    write_entry(path, contents[0])
    with ThreadPoolExecutor(8) as pool:
        writers = [pool.submit(write_entry, path, content) for content in contents * 10]
        while not all(writer.done() for writer in writers):
            assert read_entry(path) in contents
    assert [each.name for each in tmp_path.iterdir()] == ["entry.json"]


def test_a_name_as_long_as_names_may_be(tmp_path: Path) -> None:
    write_text(tmp_path / ("n" * 255), "new")
    assert (tmp_path / ("n" * 255)).read_text() == "new"


@pytest.mark.parametrize("number", [2**63, -(2**63), 10**400])
def test_an_entry_holds_no_number_beyond_64_bits(number: int) -> None:
    assert parse_entry(f'{{"a": [{2**63 - 1}]}}') == {"a": [2**63 - 1]}
    with pytest.raises(ValueError, match="beyond 64 bits"):
        parse_entry(f'{{"a": [{number}]}}')
