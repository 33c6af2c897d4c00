"""Forward passes that are the peak of a stage, and layers with other kinds behind them."""

from dataclasses import replace

import numpy as np
import pytest

from mist.model.graph import B, Block, ModelGraph, S, T
from mist.symbolic.columns import position_columns, strategy_columns
from tests.toys import count_columns, toy_graph, toy_job

MORE = 2**20  # bytes of a token: above all else
TOKENS = 2 * 2048  # of a micro-batch
NUM_LAYERS = 8
STRATEGY = {"tp": 1, "dp": 4, "zero": 2, "micro_batch": 2, "num_micro_batches": 8}
OVERHEAD = 1.0 + toy_job().platform.runtime.memory.allocator_overhead_ratio.value


def with_forward(block: Block, num_bytes: int) -> Block:
    return replace(block, forward_bytes=(num_bytes * B * S,))


def begin_bytes(graph: ModelGraph, levels: tuple[int, int, int] = (NUM_LAYERS // 2, 0, 0)) -> float:
    """As a backward pass begins on the first of two stages, with layers at three levels."""
    job = toy_job(graph)
    strategy = strategy_columns(job.placement, STRATEGY, num_stages=2)
    first, devices = np.array([0, NUM_LAYERS // 2]), np.array([(0, 4), (4, 4)])
    columns = {
        **job.cost.terms(strategy),
        **position_columns(job.placement, devices, first[[1, 1]], STRATEGY["num_micro_batches"]),
        **count_columns(job, first, levels),
    }
    return float(job.cost.stage(columns)["begin_bytes"][0])


SLOW = pytest.mark.slow  # of a kind with the one that is not


@pytest.mark.parametrize(
    "levels", [(2, 0, 2), pytest.param((4, 0, 0), marks=SLOW), pytest.param((0, 0, 4), marks=SLOW)]
)
def test_a_forward_pass_that_holds_most_is_the_peak(levels: tuple[int, int, int]) -> None:
    """Also where a layer runs forward again, and then goes backward."""
    graph = toy_graph((NUM_LAYERS,))
    once, twice = (
        begin_bytes(replace(graph, blocks=(with_forward(graph.blocks[0], n * MORE),)), levels)
        for n in (1, 2)
    )
    assert twice - once == pytest.approx(OVERHEAD * MORE * TOKENS)
    assert begin_bytes(graph, levels) < once


@pytest.mark.slow
def test_what_lies_behind_keeps_nothing_yet_as_a_layer_runs_forward() -> None:
    """One layer of the later kind has not run: less what one of the earlier kind keeps."""
    graph = toy_graph((2, 6), hidden=64)
    early, late = graph.blocks
    with_early = replace(graph, blocks=(with_forward(early, MORE), late))
    with_late = replace(graph, blocks=(early, with_forward(late, MORE)))
    sizes = {B: 2, S: 2048, T: 1}
    kept = [sum(float(each.bytes.subs(sizes)) for each in of.saved) for of in (early, late)]
    difference = begin_bytes(with_late) - begin_bytes(with_early)
    assert difference == pytest.approx(OVERHEAD * (kept[1] - kept[0]))
