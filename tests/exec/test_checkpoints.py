"""A checkpoint goes on under any layout, and a death while one is written loses nothing."""

import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mist.errors import CheckpointError
from mist.exec.run.checkpoints import save
from mist.exec.run.launch import RankFailed, run_ranks
from tests.exec.double import MAX_LOSS
from tests.exec.layouts import write_models


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_a_checkpoint_goes_on_under_other_plans(tmp_path: Path) -> None:
    write_models(tmp_path)
    run_ranks(["-m", "tests.exec.elastic", "save", str(tmp_path)], 4, timeout_s=600)
    run_ranks(["-m", "tests.exec.elastic", "two", str(tmp_path)], 2, timeout_s=600)
    found = json.loads((tmp_path / "losses.json").read_text())
    uninterrupted = found.pop("dp4")
    found["dp2"] = json.loads((tmp_path / "two.json").read_text())
    assert set(found) == {"pp2 tp2", "dp2 tp2 sp", "hsdp", "from hsdp", "dp2"}
    for done, *losses in found.values():
        assert done == 2
        assert losses == pytest.approx(uninterrupted, abs=MAX_LOSS)


@pytest.mark.slow
def test_matrices_side_by_side_are_saved_as_the_model_has_them(tmp_path: Path) -> None:
    write_models(tmp_path)
    run_ranks(["-m", "tests.exec.elastic", "side_by_side", str(tmp_path)], 2, timeout_s=600)
    found = json.loads((tmp_path / "losses.json").read_text())
    assert len(found) == 18
    for name, losses in found.items():
        model = name.split()[0]
        assert losses == pytest.approx(found[f"{model} dp2"], abs=MAX_LOSS)


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_a_death_while_saving_loses_nothing(tmp_path: Path) -> None:
    write_models(tmp_path)
    with pytest.raises(RankFailed) as failure:
        run_ranks(["-m", "tests.exec.elastic", "die", str(tmp_path)], 2, timeout_s=600)
    assert str(failure.value).startswith(f"rank 1 was ended by signal {signal.SIGKILL.value}.")
    folder = tmp_path / "dying"
    assert {path.name for path in folder.iterdir()} == {"step-1", ".step-2.partial"}
    run_ranks(["-m", "tests.exec.elastic", "recover", str(tmp_path)], 2, timeout_s=600)
    assert {path.name for path in folder.iterdir()} == {"step-1", "step-2"}


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_full_disk_loses_nothing_and_is_said(tmp_path: Path) -> None:
    """The system refuses to write beyond 100 kB of a file, as it does on a full disk."""
    state = {"w": torch.zeros(500, 500)}
    rank: Any = SimpleNamespace(
        parameters=state,
        optimizer=SimpleNamespace(num_steps=1, slots=[]),
        side_by_side={},
        chunks=[],
    )
    save(rank, tmp_path, {})
    rank.optimizer.num_steps = 2
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(CheckpointError) as full:
            save(rank, tmp_path, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    begin, end = str(full.value).split("(")
    assert begin == f"{tmp_path}/step-2 cannot be written: a file broke off, as on a full disk "
    assert end.endswith(
        "). The checkpoints before it are whole. Make room, then go on from the last one with "
        "--resume."
    )
    assert full.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    save(rank, tmp_path, {})
    assert (tmp_path / "step-2").is_dir()
