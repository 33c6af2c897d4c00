"""A checkpoint goes on under any layout, and a death while one is written loses nothing."""

import json
import signal
from pathlib import Path

import pytest

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
def test_matrices_in_pieces_are_saved_as_the_model_has_them(tmp_path: Path) -> None:
    write_models(tmp_path)
    run_ranks(["-m", "tests.exec.elastic", "pieces", str(tmp_path)], 2, timeout_s=600)
    found = json.loads((tmp_path / "losses.json").read_text())
    assert len(found) == 12
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
