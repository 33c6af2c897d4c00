"""A few cases of every category of `make fuzz`, evenly: none ends badly."""

import gc
from pathlib import Path

import pytest

from tests.fuzz.categories import CATEGORIES
from tests.fuzz.judge import ended
from tests.fuzz.mutation import Rng, mutate, places
from tests.fuzz.workspace import Workspace, made

# Three hundred in all: 12 s of processor time, after 9 s for the libraries and the workspace.
# Configurations are built by transformers, a second each: `make fuzz` has as many as of others.
CASES = {
    **{"options": range(12), "plans": range(44), "profiles": range(20), "logs": range(40)},
    **{"tables": range(28, 40), "configs": range(2, 5), "caches": range(5)},
    **{"checkpoints": range(25)},
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = made(tmp_path_factory.mktemp("fuzz"))
    gc.collect()
    gc.freeze()  # torch and sympy stay: collections need not look at them again
    return workspace


@pytest.mark.filterwarnings("ignore")  # as a process of its own has them; the judge reads them
@pytest.mark.parametrize("category", CATEGORIES)
def test_no_input_ends_badly(category: str, workspace: Workspace) -> None:
    cases = [ended(category, number, workspace) for number in CASES[category]]
    bad = [f"{each.name} {each.argv}: {each.faults}\n{each.err[-500:]}" for each in cases]
    assert not [words for words, each in zip(bad, cases, strict=True) if each.faults]
    # Cases that all end alike would show little.
    assert len({each.code for each in cases}) > 1 or category == "caches"


def test_the_same_number_is_the_same_case() -> None:
    data = {"a": [1, {"b": 2}], "c": "x"}
    assert list(places(data)) == [("a",), ("a", 0), ("a", 1), ("a", 1, "b"), ("c",)]
    first, second = ({"a": [1, {"b": 2}], "c": "x"} for _ in range(2))
    for number in range(20):
        mutate(Rng(number), first)
        mutate(Rng(number), second)
        assert repr(first) == repr(second)


def test_the_judge_sees_faults(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail() -> None:
        Path("canary").touch()
        Path(".o.yaml.0123456789abcdef").touch()
        print("{NaN}")
        raise KeyError("nobody foresaw this")

    monkeypatch.setattr("mist.cli.application.app", fail)
    faults = ended("logs", 0, workspace).faults
    assert faults[0].endswith("KeyError: 'nobody foresaw this'")
    assert faults[1:] == ("half a file: .o.yaml.0123456789abcdef", "code of a file ran")
