"""Reading measured runs: what is blank is unknown, what is wrong is said with its line."""

from pathlib import Path

import pytest

from mist.errors import InputError
from mist.validate.measured_runs import read_runs, read_stages

HEAD = "run_id,source,n_layers,step_time_s,gpu,unheard_of\n"


def test_blank_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(HEAD + "a,here,32.0,1.5,H100,x\nb,here,,,,\n")
    first, second = read_runs(path)
    assert (first.n_layers, first.step_time_s, first.gpu) == (32, 1.5, "H100")
    assert (second.n_layers, second.step_time_s, second.gpu) == (None, None, "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            HEAD + "a,here,many,,,\n",
            "{path}, line 2: n_layers many is no number that a run can have.",
        ),
        (HEAD + "a,here,,,,\na,there,,,,\n", "{path} has run a twice."),
        ("run_id\na\n", "{path} has no column source."),
        ("", "{path} has no column run_id or source."),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(InputError) as refusal:
        read_runs(path)
    assert str(refusal.value) == message.format(path=path)


def test_a_table_without_runs_is_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    for text in ("run_id,source,arch\n", 'run_id,source,"arch\none,here,gpt\n'):
        path.write_text(text)
        with pytest.raises(InputError, match="has no runs"):
            read_runs(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_runs(tmp_path / "none.csv")


STAGES = "run_id,stage,layers,checkpointed_layers,peak_allocated_mb\n"


def test_stages_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "stages.csv"
    path.write_text(STAGES + "a,1,11,2,\na,0,13,0,2048\n")
    first, second = read_stages(path)["a"]
    assert (first.layers, first.peak_allocated_mb) == (13, 2048.0)
    assert (second.checkpointed_layers, second.peak_allocated_mb) == (2, None)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a,0,13,0,\na,2,11,0,\n", "{path}: the stages of run a are not 0, 1, 2, ..."),
        ("a,0,,0,\n", "{path}, line 2: layers is blank."),
    ],
)
def test_stages_that_are_wrong(rows: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "stages.csv"
    path.write_text(STAGES + rows)
    with pytest.raises(InputError) as refusal:
        read_stages(path)
    assert str(refusal.value) == message.format(path=path)
