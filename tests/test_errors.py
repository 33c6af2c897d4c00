"""The tree of refusals, their exit codes, and the nearest names."""

import pytest

from mist.errors import (
    CheckpointError,
    Fault,
    Infeasible,
    InputError,
    MistError,
    ModelError,
    OutputError,
    PlanError,
    PlatformError,
    StatesTooLarge,
    TraceError,
    did_you_mean,
)


@pytest.mark.parametrize(
    ("error", "parent", "exit_code"),
    [
        (MistError, Exception, 2),
        (InputError, MistError, 2),
        (ModelError, InputError, 2),
        (TraceError, ModelError, 2),
        (PlatformError, InputError, 2),
        (PlanError, InputError, 2),
        (OutputError, InputError, 2),
        (Infeasible, MistError, 3),
        (StatesTooLarge, Infeasible, 3),
        (CheckpointError, MistError, 1),
    ],
)
def test_the_tree(error: type[MistError], parent: type[Exception], exit_code: int) -> None:
    assert error.__bases__ == (parent,)
    assert error.exit_code == exit_code


def test_a_plan_error_lists_its_faults() -> None:
    one = Fault(path="stages[1].dp", message="missing")
    assert str(PlanError("plan.yaml", [one])) == "plan.yaml has 1 fault:\n  stages[1].dp: missing"
    error = PlanError("plan.yaml", iter([one, one]))
    assert error.faults == (one, one)
    assert str(error).startswith("plan.yaml has 2 faults:\n  stages[1].dp: missing\n  stages")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lama3-8b", "Did you mean llama3-8b?"),
        ("LLAMA3-8B", "Did you mean llama3-8b?"),
        ("zebra", "Known: gpt2-xl, llama3-8b."),
    ],
)
def test_did_you_mean(name: str, hint: str) -> None:
    assert did_you_mean(name, ["llama3-8b", "gpt2-xl"]) == hint
