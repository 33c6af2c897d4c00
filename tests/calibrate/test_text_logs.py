"""Lines as frameworks print them, and step times that are known of them."""

import json
from pathlib import Path

import pytest

from mist.calibrate.logs import read_log
from mist.errors import InputError

# torchtitan/components/metrics.py, in colours; 8,192 tokens a GPU at 4,096 tokens/s are 2 s.
TITAN = (
    "[titan] 2025-06-01 10:00:00 - root - INFO - \x1b[31mstep: {step:2}  \x1b[32mloss:  8.1  "
    "\x1b[33mmemory: 49.59GiB(52.20%)  \x1b[34mtps: {tps}  \x1b[36mtflops: 302.80  mfu: 30.6%"
)
# megatron/training/training.py
MEGATRON = (
    " [2025-01-01 00:00:00] iteration {step:8d}/     100 | consumed samples:          256 | "
    "elapsed time per iteration (ms): 2000.0 | learning rate: 1.0E-05 | global batch size:    32 |"
)
# nanotron/trainer.py
NANOTRON = (
    "01/01/2025 [INFO|DP=0]: iteration: {step} / 100 | consumed_tokens: 131K | "
    "elapsed_time_per_iteration_ms: 2K | tokens_per_sec: 65.5K | lm_loss: 11.2"
)
STATE = {
    "global_step": 50,
    "log_history": [
        {"loss": 2.0, "step": 10},
        {"step": 50, "train_runtime": 100.0, "train_steps_per_second": 0.5},
    ],
}


def lines(text: str, **words: str) -> str:
    return "\n".join(text.format(step=step, **words) for step in range(1, 7))


@pytest.mark.parametrize(
    "text",
    [
        lines(TITAN, tps="4,096"),
        lines(MEGATRON),
        lines(NANOTRON),
        json.dumps(STATE),
        json.dumps({"train_runtime": 100.0, "train_steps_per_second": 0.5}),
        "step,step_time_s\n1,2.0\n2,2.0\n",
        "Iteration,elapsed_ms\n1,2000\n2,2000\n",
        "2.0\n2.0\n",
    ],
    ids=["torchtitan", "Megatron-LM", "nanotron", "Trainer's state", "Trainer's results",
         "seconds", "milliseconds", "one column"],
)  # fmt: skip
def test_a_step_of_two_seconds(text: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(text)
    assert read_log(path, tokens_per_gpu=8192).step_s == pytest.approx(2.0)


def test_the_first_steps_of_a_text_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("\n".join([TITAN.format(step=1, tps="64"), lines(TITAN, tps="4,096")]))
    run = read_log(path, tokens_per_gpu=8192)
    assert run.seconds == (2.0,) * 5


@pytest.mark.parametrize(
    "text",
    ["", "nothing of steps", '{"log_history": []}', "step,loss\n1,2.0\n",
     "elapsed time per iteration (ms): 0.0", '{"train_runtime": "soon", "step": 3}'],
)  # fmt: skip
def test_a_text_without_times_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text(text)
    with pytest.raises(InputError, match="is no log of a run"):
        read_log(path, tokens_per_gpu=8192)


def test_tokens_per_second_need_a_layout(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text(lines(TITAN, tps="4,096"))
    with pytest.raises(InputError, match="is no log of a run"):
        read_log(path)
