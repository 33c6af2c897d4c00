"""Checkpoint folders: what counts, what is refused, and locks that outlive no process."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mist.errors import InputError, OutputError
from mist.exec.run.checkpoint_folder import checkpoints, last_of, lock, refuse_used


def write(folder: Path, step: int, **facts: object) -> Path:
    path = folder / f"step-{step}"
    path.mkdir(parents=True)
    (path / "mist.json").write_text(json.dumps({"step": step, **facts}))
    return path


def test_last_is_what_was_written_last_not_the_highest_step(tmp_path: Path) -> None:
    write(tmp_path, 9, order=2)
    write(tmp_path, 1, order=3)
    write(tmp_path, 6)  # of an earlier version
    assert [each.step for each in checkpoints(tmp_path)] == [6, 9, 1]
    last = last_of(tmp_path, {})
    assert last is not None and last.step == 1


def test_checkpoints_of_earlier_versions_are_ordered_by_step(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        write(tmp_path, step)
    assert [each.step for each in checkpoints(tmp_path)] == [9, 10, 100]


def test_a_used_folder_is_refused_without_resume(tmp_path: Path) -> None:
    refuse_used(tmp_path / "new", resume=False)
    refuse_used(tmp_path, resume=False)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".step-1.partial").mkdir()  # of a run that died: nothing is lost
    refuse_used(tmp_path, resume=False)
    write(tmp_path, 6)
    refuse_used(tmp_path, resume=True)
    with pytest.raises(InputError) as error:
        refuse_used(tmp_path, resume=False)
    assert str(error.value) == (
        f"--checkpoint {tmp_path} holds the run that wrote step-6. Go on from it with --resume, or "
        "give another folder."
    )


@pytest.mark.parametrize("resume", [True, False])
def test_folders_of_others_are_not_taken_for_checkpoints(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "step-3").mkdir()
    (tmp_path / "step-3" / "model.pt").write_text("mine")
    assert checkpoints(tmp_path) == []
    with pytest.raises(InputError, match="has step-3, which mist apply has not written"):
        refuse_used(tmp_path, resume=resume)
    assert (tmp_path / "step-3" / "model.pt").read_text() == "mine"


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        refuse_used(tmp_path / "file", resume=False)
    with pytest.raises(OutputError, match="cannot be written"):
        lock(tmp_path / "file" / "below")


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (write(tmp_path, 2) / "mist.json").write_text("{")
    with pytest.raises(InputError, match=r"step-2 is damaged: mist.json cannot be read"):
        last_of(tmp_path, {})


def test_another_model_or_seed_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 2, fingerprint="a", seed=7)
    assert last_of(tmp_path, {"fingerprint": "a", "seed": 7}) is not None
    with pytest.raises(InputError, match="was made with seed 7, this run has 8"):
        last_of(tmp_path, {"fingerprint": "a", "seed": 8})


HOLDING = """
import subprocess, sys, time
from pathlib import Path
from mist.exec.run.checkpoint_folder import lock
handle = lock(Path(sys.argv[1]))
child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"],
                         stdin=subprocess.PIPE, pass_fds=[handle])
print("held", flush=True)
time.sleep(600)
"""


def test_a_lock_lasts_as_long_as_a_process_of_the_run(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None and run.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another run is writing into it"):
            lock(tmp_path)
        run.send_signal(signal.SIGKILL)
        run.wait()
        handle = None
        while handle is None:  # until the child has seen the end of its input
            try:
                handle = lock(tmp_path)
            except InputError:
                continue
        with pytest.raises(InputError, match="another run is writing into it"):
            lock(tmp_path)
