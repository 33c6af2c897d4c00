"""What nobody can mean is refused at once: under a second of the processor and 200 MiB.

python -m tests.test_quick_refusals    prints what each takes, imports excluded
"""

import json
import os
import resource
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest

from mist.cli import main as run_command
from tests.fuzz.mutation import BOMB

ROOT = Path(__file__).parents[1]
MOST_S = 1.0
MOST_MIB = 200
HUGE = "9" * 5000
PLAN = ("plan", "llama3-8b", "--gpus")
CHECK = ("check", "llama3-8b", "--gpus", "8")
FILES = {
    "bomb.yaml": BOMB,
    "deep.yaml": f"x: {'[' * 500}{']' * 500}",
    "deep.json": "[" * 100_000,
    "many.yaml": f"x: [{'1, ' * 1_000_000}1]",
    "digits.yaml": f"x: {HUGE}",
    "long.yaml": f"x: {'a' * 100_000_000}",
    "config.json": json.dumps({"model_type": "llama", "num_hidden_layers": 10**9}),
}
REFUSED = [
    ("check", "bomb.yaml"),
    ("compare", "bomb.yaml", "deep.json"),
    (*PLAN, "8", "--gpu", "./bomb.yaml"),
    (*PLAN, "8", "--cluster", "./deep.yaml"),
    (*PLAN, "8", "--runtime", "./digits.yaml"),
    ("check", "deep.yaml"),
    ("check", "many.yaml"),
    ("check", "long.yaml"),
    ("check", "digits.yaml"),
    ("check", "/dev/zero"),
    ("check", "config.json", "--gpus", "1"),
    (*PLAN, "1e10"),
    (*PLAN, "10000000000"),
    (*PLAN, "9" * 30),
    (*PLAN, HUGE),
    (*PLAN, "1..1000000000"),
    (*PLAN, "1..1000000000000", "--cluster", "l4-box"),
    (*PLAN, "8", "--global-batch", "9" * 20),
    (*PLAN, "8", "--seq", "1" + "0" * 30),
    (*PLAN, "8", "--set", f"tp={HUGE}"),
    (*CHECK, "--global-batch", "1000000007"),
    (*CHECK, "--global-batch", "9" * 20),
    (*CHECK, "--seq", "9" * 30),
    (*CHECK, "--micro-batch", "9223372036854775808"),
    (*CHECK, "--layers", "9" * 40),
    (*CHECK, "--vpp", "1000000000"),
    (*CHECK, "--pp", "1000000000"),
    (*CHECK, "--tp", "1000000"),
    (*CHECK, "--cluster", "x" * 5000),
    ("plan", "x" * 5000, "--gpus", "1"),
]


class Refusal(NamedTuple):
    """How a command ended, and what it took beyond what was loaded."""

    words: str
    code: int
    processor_s: float
    more_mib: float


def _refusal(words: tuple[str, ...]) -> Refusal:
    """In a process of its own, or the peak would be that of the commands before."""
    before, begin, code = _peak_mib(), time.process_time(), 0
    sys.argv = ["mist", *words]
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        try:
            run_command()
        except SystemExit as end:
            code = int(end.code or 0)
    spent_s = time.process_time() - begin
    shown = " ".join(word[:24] for word in words)
    return Refusal(shown, code, round(spent_s, 3), round(_peak_mib() - before, 1))


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print one line of JSON for each command, which runs in a copy of this process."""
    import mist.cli.application
    import mist.search.tune
    import mist.workflow.checking
    import mist.workflow.planning  # noqa: F401 - loaded once, before the time counts

    for name, text in FILES.items():
        Path(name).write_text(text)
    for words in REFUSED:
        if (child := os.fork()) == 0:
            print(json.dumps(_refusal(words)), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


@pytest.mark.slow  # loads the commands, and writes a file of 100 MB
def test_what_nobody_means_is_refused_at_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_quick_refusals"],
        **{"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}},
        capture_output=True,
        text=True,
        check=True,
    )
    found = [Refusal(*json.loads(line)) for line in done.stdout.splitlines()]
    assert len(found) == len(REFUSED)
    assert [each for each in found if each.code != 2] == []
    assert [each for each in found if each.processor_s >= MOST_S] == []
    assert [each for each in found if each.more_mib >= MOST_MIB] == []


if __name__ == "__main__":
    main()
