"""Levels that convert layers: what they cost in the formulas of a stage, by real tensors."""

from functools import cache

import pytest
import torch

from mist.errors import InputError
from mist.layers import convert_layer
from mist.model.graph import ModelGraph
from mist.pareto.strategies import priced
from mist.plans.memory_levels import CONVERTS, USUAL
from mist.plans.search_space import SearchSpace, space_of
from mist.plans.workload import Attention, MemoryLevel, Precision
from mist.platform.profiles import load_runtime
from mist.rules.levels import broken_levels
from mist.symbolic.compile import compile_model
from mist.symbolic.job import make_job
from mist.trace import TraceSetting, trace_model
from tests.layers.test_bytes import LAYERS, built, stacked
from tests.toys import adamw_setting, toy_job, toy_platform, toy_workload

RUNTIME = load_runtime("torch").profile


@cache
def graph_of(family: str, level: MemoryLevel) -> ModelGraph:
    """The trace of a model on the meta device, its layers converted as the ranks of a plan do."""
    model = built(family, "none", "byte", torch.bfloat16, "meta")
    path = LAYERS.get(family, "model.layers")
    for layer in model.get_submodule(path).children() if level in CONVERTS else ():
        convert_layer(layer, level)
    attention = Attention.MATH if family == "bert" else Attention.FLASH
    return trace_model(
        model, TraceSetting(precision=Precision.BF16, attention=attention, policy="cpu")
    )


CASES = [
    pytest.param(
        family,
        level,
        marks=() if (family, level) == ("gpt2", MemoryLevel.DROP_NORM) else pytest.mark.slow,
    )
    for family in ("llama", "gpt2", "bert")
    for level in CONVERTS
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "level"), CASES)
def test_a_stage_is_charged_what_its_converted_layers_keep(family: str, level: MemoryLevel) -> None:
    converted = {level: graph_of(family, level).blocks}
    programs = compile_model(graph_of(family, MemoryLevel.NONE), adamw_setting(RUNTIME), converted)
    name = f"cost_0_{level.column}_saved_bytes"
    costs = make_job(programs, toy_platform(1), toy_workload()).cost.costs
    model = built(family, "none", "byte", torch.bfloat16, "cpu")
    path = LAYERS.get(family, "model.layers")
    for layer in model.get_submodule(path).children():
        convert_layer(layer, level)
    keeps_output = (family, level) == ("bert", MemoryLevel.TEMPO)
    for b, s in ((1, 32), (2, 33), (3, 64)):
        hooks, alive, activation = stacked(model, path, b, s)
        # What the last of them passes on is the input of no other.
        alive, hooks = (each - activation * keeps_output for each in (alive, hooks))
        columns = dict.fromkeys(programs.costs.inputs, 1.0) | {"b": b, "s": s}
        assert hooks == alive == 2 * float(costs(columns)[name]), (b, s)


@pytest.mark.slow  # a family of which the fast tests trace nothing
def test_no_matrix_product_runs_again() -> None:
    plain, again = (graph_of("llama", level) for level in (MemoryLevel.NONE, MemoryLevel.DROP_NORM))
    for phase in ("forward", "backward"):
        assert plain.blocks[0].flop(phase) == again.blocks[0].flop(phase)
    assert len(again.blocks[0].ops) > len(plain.blocks[0].ops)


@pytest.mark.slow
def test_only_what_was_traced_is_priced() -> None:
    plain = graph_of("gpt2", MemoryLevel.NONE)
    levels = compile_model(plain, adamw_setting(RUNTIME)).levels
    assert levels == USUAL
    converted = {MemoryLevel.DROP_NORM: graph_of("gpt2", MemoryLevel.DROP_NORM).blocks}
    with_one = compile_model(plain, adamw_setting(RUNTIME), converted).levels
    assert set(with_one) - set(levels) == {MemoryLevel.DROP_NORM}


def test_another_runtime_has_no_converted_layers() -> None:
    megatron = load_runtime("megatron").profile
    assert [*broken_levels(megatron, [MemoryLevel.DROP_NORM])] == [
        "checkpoint drop-norm: runtime megatron has none, selective, full."
    ]


def test_a_space_keeps_the_levels_that_a_model_has() -> None:
    job = toy_job()  # traced as it is: nothing of it was converted
    searched = priced(space_of("mist"), job).levels
    assert searched == priced(space_of("mist"), job).levels
    with pytest.raises(InputError) as error:
        priced(SearchSpace(levels=(MemoryLevel.DROP_NORM,)), job)
    assert str(error.value) == (
        "checkpoint drop-norm: not all layers of toy can be converted (mist convert --level "
        "drop-norm says why); use checkpoint none or selective or sac-half or sdpa-only or "
        "full."
    )
