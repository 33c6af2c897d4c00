"""Do the tests see a wrong formula? Each row of mutants.yaml breaks one; its tests must fail.

The tree is copied to a temporary folder, once per worker. There the tests of all rows must pass
before anything is changed. Then each mutant is written into a copy, its tests are run, and the
file is put back. Outcomes: killed (a test failed); survived (all passed); stale (the old text is
not in the file exactly once); broken (no verdict: nothing selected, or the mutant does not even
import). Anything but killed is an error.

    python tests/mutants/run.py [NAME ...]      only the rows whose name contains a NAME
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Literal

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("mutants.yaml")
TREE = ("mist", "tests", "profiles", "examples", "plans", "pyproject.toml", "cli.py")
NUM_WORKERS = 2
TIMEOUT_S = 3600  # bounds what hangs: the tests of all rows take minutes, on a busy machine more

Outcome = Literal["killed", "survived", "stale", "broken"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One wrong formula: in `file`, `old` (found once) becomes `new`; `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.old == self.new or not self.tests:
            raise ValueError(f"{self.name}: it must change something and name its tests.")


def load(text: str) -> tuple[Mutant, ...]:
    """The rows of the table; an unknown or missing key, or a name used twice, is an error."""
    mutants = tuple(Mutant(**{**row, "tests": tuple(row["tests"])}) for row in yaml.safe_load(text))
    twice = [name for name, count in Counter(m.name for m in mutants).items() if count > 1]
    if twice:
        raise ValueError(f"Used more than once: {', '.join(twice)}.")
    return mutants


def copy_tree(folder: Path) -> Path:
    """A copy of what tests need, without compiled files, which could outlive a mutant."""
    folder.mkdir()
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / name, ignore=ignore)
        elif source.exists():
            shutil.copy2(source, folder / name)
    return folder


def run_python(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python that imports mist from `tree`, whatever is installed."""
    env = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=tree, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def run_tests(tree: Path, tests: Iterable[str]) -> subprocess.CompletedProcess[str]:
    """Run a selection of tests against the mist in `tree`, up to the first failure."""
    options = ("-x", "--quiet", "--no-header", "-p", "no:cacheprovider")
    return run_python(tree, "-m", "pytest", *options, *tests)


def check_unmutated(tree: Path, mutants: Iterable[Mutant]) -> None:
    """Stop unless the copy is what gets imported and all selected tests pass on it."""
    found = run_python(tree, "-c", "import mist.errors; print(mist.errors.__file__)").stdout
    if not Path(found.strip()).is_relative_to(tree):
        sys.exit(f"mist is imported from {found.strip()}, not from the copy in {tree}.")
    run = run_tests(tree, sorted({test for mutant in mutants for test in mutant.tests}))
    if run.returncode != pytest.ExitCode.OK:
        sys.exit(f"The tests fail before anything is changed:\n{run.stdout}{run.stderr}")


def judge(tree: Path, mutant: Mutant) -> Outcome:
    """Apply one mutant to a copy, run its tests, put the file back."""
    path = tree / mutant.file
    text = path.read_text() if path.exists() else ""
    if text.count(mutant.old) != 1:
        return "stale"
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        code = run_tests(tree, mutant.tests).returncode
    except subprocess.TimeoutExpired:
        return "killed"
    finally:
        path.write_text(text)
    verdicts: dict[int, Outcome] = {0: "survived", 1: "killed"}
    return verdicts.get(code, "broken")


def judge_all(trees: Iterable[Path], mutants: Iterable[Mutant]) -> list[tuple[Mutant, Outcome]]:
    """Judge every mutant, each in a copy that no other is using; prints as it goes."""
    free: Queue[Path] = Queue()
    for tree in trees:
        free.put(tree)

    def task(mutant: Mutant) -> tuple[Mutant, Outcome]:
        tree = free.get()
        try:
            outcome = judge(tree, mutant)
        finally:
            free.put(tree)
        print(f"{outcome:9} {mutant.file:32} {mutant.name}", flush=True)
        return mutant, outcome

    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        return list(pool.map(task, mutants))


def main(names: list[str]) -> int:
    """Judge the rows named, or all; the exit code says whether all were killed."""
    mutants = [m for m in load(TABLE.read_text()) if not names or any(n in m.name for n in names)]
    if not mutants:
        sys.exit(f"No mutant has {' or '.join(names)} in its name.")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees = [copy_tree(Path(folder).resolve() / str(i)) for i in range(NUM_WORKERS)]
        check_unmutated(trees[0], mutants)
        outcomes = Counter(outcome for _, outcome in judge_all(trees, mutants))
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())))
    return 0 if outcomes["killed"] == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
