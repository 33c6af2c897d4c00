"""How a command ends: a listed exit code and a line; output that is whole; never a traceback."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mist import cli
from mist.cli import INTERNAL_ERROR, application, common
from mist.errors import InputError, OutputError
from mist.pareto.strategies import divisors
from mist.plans.objectives import Candidate, Objective, chosen
from mist.plans.workload import MOST_GPUS
from mist.platform import load_platform
from mist.symbolic.load_programs import quiet
from mist.trace import resolve
from mist.trace.models.source import MOST_PARTS
from mist.units import LARGEST_INTEGER, parse_whole
from mist.workflow.gpu_counts import MOST_COUNTS, counts_of
from mist.workflow.planning import Effort
from tests.sample_plans import estimate_of, stage_estimate

ROOT = Path(__file__).parents[1]
MIST = (sys.executable, str(ROOT / "cli.py"))


def run(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[object, str, str]:
    """Exit code, output and errors of a command in this process."""
    sys.argv = ["mist", *words]
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr()
    return end.value.code, printed.out, printed.err


@pytest.mark.slow
def test_an_output_that_cannot_be_written_is_exit_1() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*MIST, "profiles"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    words = "mist: the standard output cannot be written: No space left on device.\n"
    assert done.stderr == words


@pytest.mark.slow
def test_a_closed_pipe_is_exit_1() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*MIST, "profiles"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == "mist: the standard output cannot be written: Broken pipe.\n"


def test_a_folder_that_was_removed(tmp_path: Path) -> None:
    """Where torch would end the process, with words about a library."""
    (tmp_path / "gone").mkdir()
    words = f"rmdir ../gone && {sys.executable} {ROOT / 'cli.py'} profiles"
    done = subprocess.run(
        words, shell=True, cwd=tmp_path / "gone", capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "mist: the current folder cannot be used: No such file or directory. Change to one that "
        "exists.\n"
    )


def test_nobody_listens_to_the_errors(tmp_path: Path) -> None:
    words = f"{sys.executable} {ROOT / 'cli.py'} plan none.py --gpus 1 2>&-"
    done = subprocess.run(words, shell=True, cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")


def test_an_error_that_nobody_foresaw_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        print("half of a result")
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(application, "app", fail)
    code, _, err = run("profiles", capsys=capsys)
    assert code == INTERNAL_ERROR
    assert err.startswith("mist: internal error: ZeroDivisionError: by nothing. This is a fault")
    found = re.search(r"report it, with (\S+)\.\n", err)
    assert found is not None
    report = Path(found[1])
    assert "in fail" in report.read_text()
    report.unlink()


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(OutputError, match="infinite or none"):
            common.print_json("mist.check/1", {"a": [value]})
    assert capsys.readouterr().out == ""


def test_a_name_of_5000_characters_is_one_short_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run("plan", "x" * 5000, "--gpus", "1", capsys=capsys)
    assert code == 2
    assert "characters)" in err
    assert len(err) < 2500


def test_ctrl_c_while_the_commands_load() -> None:
    """Before any of them is there to take it; typer alone takes a third of a second to load."""
    code = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)

class CtrlC:
    def find_spec(self, name, *_):
        if name == "mist.cli.application":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, CtrlC())
sys.argv = ["mist", "profiles"]
from mist.cli import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "mist: interrupted. No file is half written.\n"


HUGE = "9" * 5000
PLACED = ("check", "llama3-8b", "--gpus", "8")
REFUSED = [
    ("plan", "llama3-8b", "--gpus", HUGE),
    ("plan", "llama3-8b", "--gpus", f"1..{HUGE}"),
    ("plan", "llama3-8b", "--gpus", "1..1000000000"),
    ("plan", "llama3-8b", "--gpus", "1e400"),
    ("plan", "llama3-8b", "--gpus", "800000000000000000000"),
    ("plan", "llama3-8b", "--gpus", "10000000000"),
    ("plan", "llama3-8b", "--gpus", "8", "--set", f"tp={HUGE}"),
    ("plan", "llama3-8b", "--gpus", "8", "--max", f"tp={HUGE}"),
    ("plan", "llama3-8b", "--gpus", "8", "--price", "1e300"),
    ("plan", "llama3-8b", "--gpus", "8", "--time-limit", "nan"),
    (*PLACED, "--checkpoint", HUGE),
    (*PLACED, "--layers", f"{HUGE},1"),
    (*PLACED, "--micro-batch", "9223372036854775808"),
    (*PLACED, "--tp", "1" + "0" * 30),
    (*PLACED, "--gpu", "x" * 5000),
    (*PLACED, "--cluster", "x" * 5000 + "/y.yaml"),
    (*PLACED, "--cluster", "~nobody-of-that-name/x.yaml"),
    ("check", "~nobody-of-that-name/x.py", "--gpus", "8"),
    ("check", "x" * 5000 + ".yaml"),
    ("trace", "llama3-8b", "--at", f"b={HUGE},s=1"),
]


@pytest.mark.parametrize("words", REFUSED, ids=lambda words: " ".join(words)[:60])
def test_absurd_numbers_and_names(
    words: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*words, capsys=capsys)
    assert (code, out) == (2, "")
    assert re.search(r"^mist: |^Error|Usage:", err)


@pytest.mark.parametrize("text", ["0", "7", "-3", str(LARGEST_INTEGER)])
def test_whole_numbers(text: str) -> None:
    assert parse_whole(text) == int(text)


@pytest.mark.parametrize("text", ["", "1.0", "1e3", "+1", "\u0668", " 1", str(2**63), HUGE])
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(ValueError, match="whole number within 64 bits"):
        parse_whole(text)


@pytest.mark.parametrize("number", [1, 2, 12, 36, 97, 360, 1024, 9973, 9973**2])
def test_divisors_are_those_that_divide(number: int) -> None:
    tried = range(1, number + 1) if number < 10**4 else (1, 9973, number)
    assert divisors(number) == tuple(d for d in tried if number % d == 0)


def test_a_batch_of_a_billion_has_a_hundred_divisors() -> None:
    # 10^9 = 2^9 5^9: ten powers of each.
    assert len(divisors(10**9)) == 100
    assert len(divisors(2**32)) == 33


@pytest.mark.parametrize("last", [10**3, 10**6, MOST_GPUS])
def test_a_range_of_a_million_is_a_dozen_numbers(last: int) -> None:
    cluster = load_platform(num_gpus=1, gpu="l4", cluster=None, runtime="torch").cluster
    counts = counts_of(f"1..{last}").of(cluster)
    powers = [n for n in counts if n & (n - 1) == 0]
    assert len(counts) <= max(MOST_COUNTS, len(powers))
    assert 2 ** (last.bit_length() - 1) in counts
    assert max(counts) <= last


def test_a_range_beyond_what_is_planned_for() -> None:
    words = (
        f"--gpus 8..1000000000: 1000000000 is more than Mist plans for. Try --gpus 8..{MOST_GPUS}."
    )
    with pytest.raises(InputError, match=re.escape(words)):
        counts_of("8..1000000000")


def test_a_time_limit_is_a_time() -> None:
    with pytest.raises(Exception, match="expected seconds from 0 up"):
        Effort(time_limit_s=float("nan"), progress=quiet)


def candidate(cluster: str) -> Candidate:
    return Candidate(
        num_gpus=1,
        cluster=cluster,
        device="l4",
        price_usd=None,
        price_source="",
        estimate=estimate_of(stage_estimate()),
        why="",
    )


@pytest.mark.parametrize("objective", [Objective.THROUGHPUT, Objective.MEMORY])
def test_of_clusters_that_tie_the_first_name_is_chosen(objective: Objective) -> None:
    names = ["one", "another", "third"]
    for order in (names, names[::-1]):
        candidates = [candidate(name) for name in order]
        assert order[chosen(candidates, objective)] == "another"


@pytest.mark.parametrize(
    ("key", "number"),
    [
        ("num_hidden_layers", 10**9),
        ("n_layer", 5000),
        ("num_local_experts", 10**9),
        ("num_labels", 10**9),
        ("num_attention_heads", 1e30),
    ],
)
def test_parts_of_a_model_beyond_count(key: str, number: float, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for config in ({key: number}, {"text_config": {key: number}}):
        path.write_text(json.dumps({"model_type": "llama", **config}))
        with pytest.raises(Exception, match=f"has {key} .*: Mist builds at most"):
            resolve(str(path))


def test_sizes_are_no_counts(tmp_path: Path) -> None:
    sizes = {"head_dim": 10**5, "block_size": 10**6, "num_hidden_layers": 4096, "vocab_size": 10**7,
             "vocab_size_per_layer_input": 10**6}  # fmt: skip
    assert max(MOST_PARTS.values()) < 10**7
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **sizes}))
    assert resolve(str(path)).content
