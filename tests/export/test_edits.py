"""What to change in a file: the setting in its own words, and the line that has it."""

from pathlib import Path

import pytest

from mist.export.edits import MOST_EDITS, edits_of, settings_of
from mist.export.target import Written
from mist.workflow.checking import Checked, HandLayout
from mist.workflow.foreign_files import check_file, foreign_file
from mist.workflow.request import Question
from tests.fast_cases import first_fast
from tests.toys import toy_graph
from tests.workflow.answering import answer_with

TEXT = """# --zero 3 in a comment is no setting
run --zero 1 \\
    --micro 2
"""


def test_lines_that_set_something() -> None:
    written = Written(
        files={
            "a.sh": "# about\nOPTIONS=(\n    --zero 1  # stages[].zero\n)\n",
            "b.json": '{\n  "mist export": {\n    "zero": "stages[].zero"\n  },\n  "zero": 1,\n}\n',
        }
    )
    assert settings_of(written) == ("OPTIONS=(", "--zero 1", '"mist export": {', '"zero": 1')


def test_a_change_an_addition_and_a_removal_by_hand() -> None:
    before, after = ("--zero 1", "--micro 2", "--never x"), ("--zero 3", "--offload")
    assert edits_of("run.sh", TEXT, before, after) == (
        "run.sh, line 2: --zero 3",
        "add --offload to run.sh",
        "remove --micro (run.sh, line 3)",
    )


def test_a_large_change_is_not_said_line_by_line() -> None:
    after = tuple(f"--new{i} 1" for i in range(MOST_EDITS + 1))
    assert edits_of("run.sh", TEXT, (), after) == ()


FILES = {
    "train.sh": "pretrain_gpt.py --tensor-model-parallel-size 4 --seq-length 2048 --bf16\n"
    "--global-batch-size 64 --micro-batch-size 1\n--recompute-granularity full\n"
    "--recompute-method block --recompute-num-layers 8\n",
    "a.yaml": "base_model: toy\nsequence_len: 2048\nmicro_batch_size: 1\nbf16: true\n"
    "gradient_accumulation_steps: 16\nfsdp_version: 2\ndp_shard_size: 2\ntensor_parallel_size: 4\n"
    "fsdp_config:\n  reshard_after_forward: true\n  activation_checkpointing: true\n",
}
# Nothing needs to be run again: there is room for all of it.
FIRST = {
    "train.sh": "remove --recompute-granularity (train.sh, line 3)",
    "a.yaml": "a.yaml, line 11: activation_checkpointing: false",
}


def judged(name: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Checked:
    answer_with(toy_graph((8,), hidden=4096), monkeypatch)
    monkeypatch.chdir(folder)
    Path(name).write_text(FILES[name])
    file = foreign_file(name)
    assert file is not None
    question = Question(model="toy.py", num_gpus=8, gpu="h100-sxm", seq_len=2048, global_batch=32)
    typed = {"model": "toy.py", "runtime": "torch"}
    typed |= {"gpus": 8} if name == "train.sh" else {}  # sizes of meshes say it too
    return check_file(file, question, HandLayout(), typed)


@pytest.mark.parametrize("name", first_fast(FILES))
def test_suggestions_are_in_the_words_of_the_file_with_its_lines(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    *changes, last = judged(name, monkeypatch, tmp_path).suggestions
    assert 1 <= len(changes) <= 3
    assert any(change.startswith(FIRST[name]) for change in changes)
    assert all("per step, peak" in change for change in changes)
    assert last.startswith("mist plan --runtime torch: ")
    assert " times as fast (" in last
