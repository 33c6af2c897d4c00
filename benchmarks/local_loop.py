"""The loop on this machine: measure it, plan layouts of a small model, train them, compare.

python benchmarks/local_loop.py FOLDER [--model llama] [--ranks 2] [--seconds 75] [--steps 7]

Prints a table in Markdown with a row for each layout, and the errors in all. All layouts are
trained in turn, `--rounds` times, so that a machine that drifts does so for all of them; each waits
for other programs to be quiet, and rounds that were disturbed are left out. `others`: the largest
share of the processors that other programs had. FOLDER holds plans, logs and the profile, which is
measured unless it is there.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean, median
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mist.calibrate.logs import LoggedRun, read_log
from mist.calibrate.run_comparison import Beside, RunComparison, compared
from mist.exec import RunOptions
from mist.exec.profiling import Busy, Request
from mist.plans.file import load_plan, save_plan
from mist.plans.workload import Precision
from mist.platform.machine import dump_machine
from mist.platform.profiles import find_machine
from mist.validate.scores import kendall
from mist.workflow.applying import apply_plan
from mist.workflow.checking import HandLayout, check_layout
from mist.workflow.machine_profile import profile
from mist.workflow.plan_model import TRUSTED
from mist.workflow.request import Question

SEQ_LEN = 256
SAMPLES_PER_RANK: Final = 4
LLAMA: Final = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": SEQ_LEN,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
GPT2: Final = {
    "model_type": "gpt2",
    "vocab_size": 6000,
    "n_embd": 384,
    "n_layer": 6,
    "n_head": 6,
    "n_positions": SEQ_LEN,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
MODELS: Final = {"llama": LLAMA, "gpt2": GPT2}
LAYOUTS: Final = {
    "zero0 mb4": HandLayout(zero=0, micro_batch=4),
    "zero0 mb1": HandLayout(zero=0, micro_batch=1),
    "zero1 mb2": HandLayout(zero=1, micro_batch=2),
    "zero2 mb2": HandLayout(zero=2, micro_batch=2),
    "zero3 mb4": HandLayout(zero=3, micro_batch=4),
    "zero3 mb1": HandLayout(zero=3, micro_batch=1),
    "zero3 mb4 full": HandLayout(zero=3, micro_batch=4, checkpoint="full"),
    "zero2 mb4 selective": HandLayout(zero=2, micro_batch=4, checkpoint="selective"),
    "tp2 mb4": HandLayout(tp=2, micro_batch=4),
    "tp2 mb2 full": HandLayout(tp=2, micro_batch=2, checkpoint="full"),
    "pp2 mb1": HandLayout(pp=2, micro_batch=1),
    "pp2 mb2": HandLayout(pp=2, micro_batch=2),
}
OF_FOUR: Final = {
    "zero0 mb2": HandLayout(zero=0, micro_batch=2),
    "zero1 mb2": HandLayout(zero=1, micro_batch=2),
    "zero2 mb1": HandLayout(zero=2, micro_batch=1),
    "zero3 mb4": HandLayout(zero=3, micro_batch=4),
    "zero3 mb2 full": HandLayout(zero=3, micro_batch=2, checkpoint="full"),
    "tp2 zero1 mb4": HandLayout(tp=2, zero=1, micro_batch=4),
    "tp2 zero3 mb4": HandLayout(tp=2, zero=3, micro_batch=4),
    "pp2 zero0 mb2": HandLayout(pp=2, micro_batch=2),
    "pp2 zero1 mb2": HandLayout(pp=2, zero=1, micro_batch=2),
    "pp2 tp2 mb2": HandLayout(pp=2, tp=2, micro_batch=2),
    "pp2 mb2 selective": HandLayout(pp=2, micro_batch=2, checkpoint="selective"),
    "pp4 mb2": HandLayout(pp=4, micro_batch=2),
}
OF_RANKS: Final = {2: LAYOUTS, 4: OF_FOUR}
QUIET_RATIO, MOST_WAIT_S = 0.1, 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One layout: what was predicted and measured, and how busy other programs were meanwhile."""

    name: str
    found: RunComparison
    others_ratio: float

    @property
    def step(self) -> Beside:
        return self.found.rows[0]

    @property
    def peaks(self) -> tuple[Beside, ...]:
        return tuple(row for row in self.found.rows if row.unit == "B")


def wait_for_quiet() -> None:
    """Until other programs leave the processors alone for 2 s; for a while only."""
    limit = time.monotonic() + MOST_WAIT_S
    while time.monotonic() < limit:
        before = Busy.now()
        time.sleep(2.0)
        if Busy.now().since(before).others_ratio <= QUIET_RATIO:
            return


def plan_file(name: str, folder: Path, model: str, num_ranks: int) -> Path:
    """Plan a layout by the measured profile."""
    question = Question(
        model=str(folder / f"{model}.json"),
        num_gpus=num_ranks,
        cluster=str(folder / f"local-{num_ranks}.yaml"),
        seq_len=SEQ_LEN,
        global_batch=SAMPLES_PER_RANK * num_ranks,
        precision=Precision.FP32,
    )
    path = folder / f"{model}-{num_ranks}-{name.replace(' ', '-')}.yaml"
    save_plan(check_layout(question, OF_RANKS[num_ranks][name]).plan, path)
    return path


def train(path: Path, number: int, steps: int) -> tuple[LoggedRun, float]:
    """Train once; the log, and the share of the processors that other programs had."""
    wait_for_quiet()
    log, before = path.with_suffix(f".{number}.json"), Busy.now()
    options = RunOptions(plan=str(path), steps=steps, log=str(log))
    apply_plan(path, options, lambda message: None, TRUSTED)
    return read_log(log), Busy.now().since(before).others_ratio


def pooled(name: str, path: Path, runs: Sequence[tuple[LoggedRun, float]]) -> Ran:
    """The steps of all undisturbed rounds together; of the quietest one, if none was."""
    quiet = [run for run in runs if run[1] <= QUIET_RATIO] or [min(runs, key=lambda run: run[1])]
    seconds = tuple(s for log, _ in quiet for s in log.seconds)
    log = replace(quiet[0][0], seconds=seconds)
    others = max(ratio for _, ratio in quiet)
    return Ran(name=name, found=compared(load_plan(path), log), others_ratio=others)


def line(ran: Ran) -> str:
    """A row of the table; of several stages the peak that is farthest off."""
    step, peak = ran.step, max(ran.peaks, key=lambda row: abs(row.error_ratio))
    return (
        f"| {ran.name} | {step.measured:.3f} s +-{step.spread_ratio:.0%} | {step.predicted:.3f} s "
        f"| {step.error_ratio:+.0%} | {peak.measured / 2**20:.0f} MiB "
        f"| {peak.predicted / 2**20:.0f} MiB | {peak.error_ratio:+.1%} | {ran.others_ratio:.0%} |"
    )


def summary(runs: list[Ran]) -> str:
    """Errors over all layouts, and how well their order is predicted."""
    predicted, measured = (
        np.array([getattr(ran.step, name) for ran in runs]) for name in ("predicted", "measured")
    )
    errors = [abs(ran.step.error_ratio) for ran in runs]
    peaks = [abs(row.error_ratio) for ran in runs for row in ran.peaks]
    within = sum(ran.step.is_within for ran in runs)
    return (
        f"step: median error {median(errors):.1%}, largest {max(errors):.1%}, "
        f"{within} of {len(runs)} within the promised interval; "
        f"Kendall tau {kendall(predicted, measured):.2f}, "
        f"{apart(predicted, runs):.2f} of pairs that differ by more than either spread; "
        f"peak: median error {median(peaks):.1%}, largest {max(peaks):.1%}"
    )


def apart(predicted: NDArray[np.float64], runs: list[Ran]) -> float:
    """Kendall's tau over the pairs whose order the measurement itself tells."""
    signs = [
        float(np.sign((a.step.measured - b.step.measured) * (predicted[i] - predicted[j])))
        for (i, a), (j, b) in combinations(enumerate(runs), 2)
        if abs(a.step.measured - b.step.measured)
        > max(a.step.measured * a.step.spread_ratio, b.step.measured * b.step.spread_ratio)
    ]
    return fmean(signs) if signs else 0.0


def main() -> None:
    """Measure, train, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=75.0)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--model", choices=list(MODELS), default="llama")
    parser.add_argument("--ranks", type=int, choices=list(OF_RANKS), default=2)
    parser.add_argument("--layouts", nargs="*")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    (asked.folder / f"{asked.model}.json").write_text(json.dumps(MODELS[asked.model]))
    local = asked.folder / f"local-{asked.ranks}.yaml"
    if not local.exists():
        wait_for_quiet()
        request = Request(device="cpu", num_ranks=asked.ranks, seconds=asked.seconds)
        made = profile(request, local.stem, lambda message: print(message, file=sys.stderr))
        local.write_text(dump_machine(made))
    machine = find_machine(str(local))
    assert machine is not None
    print(machine.profile.what)
    print("| layout | measured step | predicted | off by | measured peak | predicted | off by "
          "| others |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    names = asked.layouts or OF_RANKS[asked.ranks]
    paths = {name: plan_file(name, asked.folder, asked.model, asked.ranks) for name in names}
    logs: dict[str, list[tuple[LoggedRun, float]]] = {name: [] for name in paths}
    for number in range(asked.rounds):
        for name, path in paths.items():
            logs[name].append(train(path, number, asked.steps))
    runs = [pooled(name, path, logs[name]) for name, path in paths.items()]
    print("\n".join(map(line, runs)))
    print(summary(runs))


if __name__ == "__main__":
    main()
