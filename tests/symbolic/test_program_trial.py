"""Programs that are well formed and nonsense do not compute; those of models do."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from mist.model.summary import Lengths
from mist.symbolic.compile import compile_model
from mist.symbolic.program import ModelPrograms, Program
from mist.symbolic.program_codec import decode_program, encode_program
from mist.symbolic.program_trial import NUM_TOKENS, _seq_len, computes, stand_ins
from tests.toys import adamw_setting, toy_graph, toy_platform


@pytest.fixture(scope="module")
def programs() -> ModelPrograms:
    return compile_model(toy_graph(), adamw_setting(toy_platform().runtime))


def test_the_programs_of_a_model_compute(programs: ModelPrograms) -> None:
    assert computes(programs)


def changed(programs: ModelPrograms, name: str, **fields_of: Any) -> ModelPrograms:  # noqa: ANN401
    """With other fields in the data of one program."""
    data = encode_program(getattr(programs, name)) | fields_of
    return replace(programs, **{name: decode_program(data)})


@pytest.mark.parametrize(
    "result",
    [
        ["gemm_s", 1, 1, 1, 1, 1],
        ["memory_softmax_s", 1],
        ["reduce", 1],
        ["select", "s", "s"],
        ["list", 1, ["list", 2]],
        ["neg", ["list", 1]],
        ["list", 1, 2, 3],
        ["neg", "s"],
        ["log", 0],
        ["infix", "s", "/", 0],
        ["infix", ["neg", "s"], "**", 0.5],
        "nan",
        "inf",
        "maximum",
    ],
)
def test_results_that_are_no_numbers_or_negative_do_not_compute(
    programs: ModelPrograms, result: object
) -> None:
    """Each in the place of all FLOPs; of a sound one (b times s) they compute."""
    size = len(programs.flop.outputs)
    sound = changed(programs, "flop", results=[["infix", "b", "*", "s"]] * size)
    assert computes(sound)
    assert not computes(changed(programs, "flop", results=[result] * size))


@pytest.mark.parametrize("word", [["maximum", 1], ["maximum", "s", 1, "s"], ["sqrt"]])
def test_functions_of_numpy_have_their_arguments(programs: ModelPrograms, word: object) -> None:
    with pytest.raises(ValueError, match="arguments of"):
        changed(programs, "flop", results=[word] * len(programs.flop.outputs))


@pytest.mark.parametrize(
    "name", [item.name for item in fields(ModelPrograms) if item.name != "facts"]
)
def test_a_program_with_an_input_that_nobody_has_does_not_compute(
    programs: ModelPrograms, name: str
) -> None:
    inputs = getattr(programs, name).inputs
    assert not computes(changed(programs, name, inputs=[*inputs, "nobody"]))


@pytest.mark.parametrize("name", ["costs", "terms", "search_terms", "search", "stage", "flop"])
def test_a_program_without_an_output_that_is_read_does_not_compute(
    programs: ModelPrograms, name: str
) -> None:
    outputs = [f"other_{word}" for word in getattr(programs, name).outputs]
    assert not computes(changed(programs, name, outputs=outputs))


def test_the_domain_is_run_too(programs: ModelPrograms) -> None:
    source = "def program(b, s, t):\n    return (gemm_s(1), )\n"
    domain = Program(inputs=("b", "s", "t"), outputs=("s <= 8",), source=source)
    assert not computes(replace(programs, domain=domain))


@pytest.mark.parametrize(
    ("lengths", "longest", "expected"),
    [
        (Lengths(), None, NUM_TOKENS),
        (Lengths(), 100, 100),
        (Lengths(last=511), 100_000, 511),
        (Lengths(first=5000), 8192, 5000),
        (Lengths(multiple=96), 1000, 960),
        (Lengths(first=384, last=384), None, 384),
    ],
)
def test_the_sequence_is_one_that_was_traced(
    programs: ModelPrograms, lengths: Lengths, longest: int | None, expected: int
) -> None:
    facts = replace(programs.facts, lengths=lengths, max_seq_len=longest)
    assert _seq_len(facts) == expected
    assert expected in lengths


def test_stand_ins_are_as_long_as_all_they_stand_for() -> None:
    law = stand_ins()["together_s"]
    assert np.all(law([1.0, 2.0], 3.0) == [4.0, 5.0])
    with pytest.raises(TypeError, match="5 arguments of a law"):
        law(1, 2, 3, 4, 5)
