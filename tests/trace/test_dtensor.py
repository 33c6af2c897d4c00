"""The tensor-parallel trace against torch's DTensor on a fake mesh: exact at t = 1, 2, 4, 8.

DTensor divides the model by its own rules and is measured rank-locally (`dtensor_oracle`); the
trace has the same sizes as expressions in t.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import torch
from sympy import Expr

from mist.model.graph import B, Block, S, T
from mist.model.summary import Traffic
from mist.plans.workload import Attention, Precision
from mist.platform.profiles import load_runtime
from mist.symbolic import symbols as sym
from mist.symbolic.block import (
    COLLECTIVES,
    collective_cost,
    device_cost,
    rank_params,
    saved_bytes,
)
from mist.symbolic.cost_setting import figure
from mist.symbolic.symbols import MEMORY
from mist.trace import TraceSetting, trace_model
from tests.tokens import tokens
from tests.toys import adamw_setting
from tests.trace.dtensor_oracle import DEGREES, FAMILIES, HIDDEN, Measured, Mode

ROOT = Path(__file__).parents[2]
BF16 = TraceSetting(precision=Precision.BF16, attention=Attention.FLASH)
TORCH = adamw_setting(load_runtime("torch").profile)

MEMORY_SCALE = figure(TORCH.runtime, "kernels.memory_time_scale")

Point = tuple[int, int]
TYPICAL: Point = (2, 1024)
SLOW = pytest.mark.slow
NAMES = {
    "all_gather": "all_gather_into_tensor",
    "reduce_scatter": "reduce_scatter_tensor",
    "all_reduce": "all_reduce",
}
EXACT = ("llama", "gpt-neox", "bert", "cohere", "olmo2")
# Of a norm over all heads DTensor adds up whole gradients, where its means are enough.
SENDS_MORE = ("olmo2",)
OF_EACH = [pytest.param(family, marks=[SLOW] * (family != "llama")) for family in EXACT]
EXCHANGES = [each for each in OF_EACH if each.values[0] not in SENDS_MORE]
SCALES = ("memory", "scores", "attention")
VECTORS = 16
PARTLY = ("lfm2",)  # of which a module with matrices stays whole
ROWS = ("torch-attention",)  # behind attention tokens are rows, which DTensor does not divide again
POINTS = [TYPICAL, *(pytest.param(point, marks=SLOW) for point in [(1, 1024), (3, 96)])]


@cache
def ranks(point: Point, *families: str) -> dict[tuple[str, Mode, int], Measured]:
    """Everything measured at (b, s), in a process of its own: a process group is global."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.trace.dtensor_oracle",
         *map(str, point), *families],
        capture_output=True, text=True, check=True, timeout=600, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found = [Measured(**fields) for fields in json.loads(run.stdout)]
    return {(each.family, each.mode, each.num_ranks): each for each in found}


@cache
def block_of(family: str) -> Block:
    with torch.device("meta"):
        model = (FAMILIES[family].traced or FAMILIES[family].build)()
    graph = trace_model(model, BF16)
    assert (graph.notes == ()) is (family not in PARTLY)
    return graph.blocks[0]


def at(expr: Expr, point: Point, num_ranks: int) -> int:
    value = expr.subs({B: point[0], S: point[1], T: num_ranks})
    assert value.is_Integer
    return int(value)


def storages(block: Block, point: Point, num_ranks: int) -> list[tuple[str, int]]:
    saved = block.saved_single if point[0] == 1 else block.saved
    return sorted((f"torch.{each.dtype}", at(each.bytes, point, num_ranks)) for each in saved)


def in_all(measured: Measured) -> int:
    return sum(size for _, size in measured.saved)


@pytest.mark.parametrize("point", POINTS, ids=str)
@pytest.mark.parametrize("num_ranks", DEGREES)
@pytest.mark.parametrize("family", OF_EACH)
def test_rank_of_divided_matrices_is_exact(family: str, num_ranks: int, point: Point) -> None:
    block, real = block_of(family), ranks(point, family)[family, "tp", num_ranks]
    assert at(block.flop("forward"), point, num_ranks) == real.forward_flop
    assert at(block.flop("backward"), point, num_ranks) == real.backward_flop
    assert at(rank_params(block.params), point, num_ranks) == real.num_params
    assert storages(block, point, num_ranks) == [tuple(each) for each in real.saved]


@pytest.mark.parametrize("point", POINTS, ids=str)
@pytest.mark.parametrize("num_ranks", DEGREES)
@pytest.mark.parametrize("family", OF_EACH)
def test_rank_of_divided_sequence_is_exact(family: str, num_ranks: int, point: Point) -> None:
    """The rule of layouts: replicated / t, gathered whole, sharded as it is."""
    block, real = block_of(family), ranks(point, family)[family, "sp", num_ranks]
    assert at(block.flop("forward"), point, num_ranks) == real.forward_flop
    assert at(block.flop("backward"), point, num_ranks) == real.backward_flop
    assert at(rank_params(block.params), point, num_ranks) == real.num_params
    assert at(saved_bytes(block, TORCH), point, num_ranks) == in_all(real)


def transient_bytes(block: Block, point: Point, num_ranks: int, *, divided: bool) -> int:
    """The most that a backward pass has alive beside the saved; `divided`: among tokens, too."""
    numbers = tokens(num_ranks if divided else 1, samples=point[0])
    found = [size.subs(numbers) for size in block.transient_with_grads_bytes]
    return max(at(size, point, num_ranks) for size in found)


@pytest.mark.parametrize("point", POINTS, ids=str)
@pytest.mark.parametrize("num_ranks", DEGREES)
@pytest.mark.parametrize("family", OF_EACH)
def test_transients_of_divided_matrices_are_exact(
    family: str, num_ranks: int, point: Point
) -> None:
    real = ranks(point, family)[family, "tp", num_ranks]
    assert transient_bytes(block_of(family), point, num_ranks, divided=False) == (
        real.transient_bytes
    )


@pytest.mark.parametrize("point", POINTS, ids=str)
@pytest.mark.parametrize("num_ranks", DEGREES)
@pytest.mark.parametrize("family", EXCHANGES)
def test_transients_of_divided_sequence_are_exact_or_a_share_more(
    family: str, num_ranks: int, point: Point
) -> None:
    """Exact where a residual needs the share that was gathered; else torch frees it at once."""
    real = ranks(point, family)[family, "sp", num_ranks]
    found = transient_bytes(block_of(family), point, num_ranks, divided=True)
    share = 2 * point[0] * point[1] * HIDDEN // num_ranks
    most = real.transient_bytes + (share if num_ranks > 1 and family != "llama" else 0)
    assert real.transient_bytes <= found <= most


@pytest.mark.parametrize("num_ranks", DEGREES)
@pytest.mark.parametrize("family", EXCHANGES)
def test_collectives_are_dtensors(family: str, num_ranks: int) -> None:
    """Nothing at t = 1; else kind, phase, number and bytes. An all-gather is given a share."""
    block, measured = block_of(family), ranks(TYPICAL, family)
    for mode in get_args(Mode):
        expected = collectives(block, mode, num_ranks)
        assert measured[family, mode, num_ranks].collectives == expected


def collectives(block: Block, mode: Mode, num_ranks: int) -> dict[str, dict[str, list[int]]]:
    """Phase -> operation -> bytes put in, one by one."""
    expected: dict[str, dict[str, list[int]]] = {"forward": {}, "backward": {}}
    for each in block.collectives(sequence_parallel=mode == "sp") if num_ranks > 1 else ():
        shares = num_ranks if each.kind == "all_gather" else 1
        given = at(each.bytes, TYPICAL, num_ranks) // shares
        expected[each.phase].setdefault(NAMES[each.kind], []).extend([given] * each.count)
    return expected


def copied_bytes(block: Block, phase: str, point: Point, num_ranks: int) -> int:
    """What the copies around collectives write, by the seconds that they are charged.

    Every law that is no copy's takes no time here, and a copy half the bytes it reads and writes.
    """
    seconds = collective_cost(block, TORCH, recomputed_exits=0)[f"tp_{phase}_s"]
    laws = {law: lambda *_: 0 for law in COLLECTIVES.values()}
    laws[MEMORY[Traffic.POINTWISE]] = lambda num_bytes, _: num_bytes / 2
    for law, found in laws.items():
        seconds = seconds.replace(law, found)
    return at(seconds.subs(MEMORY_SCALE, 1), point, num_ranks)


@pytest.mark.parametrize("point", [TYPICAL, pytest.param((1, 1024), marks=SLOW)], ids=str)
@pytest.mark.parametrize("num_ranks", DEGREES)
@pytest.mark.parametrize("family", EXCHANGES)
def test_copies_of_tokens_are_dtensors(family: str, num_ranks: int, point: Point) -> None:
    """Concatenations that a divided sequence adds; one sample is gathered without."""
    whole, real = (ranks(point, family)[family, mode, num_ranks] for mode in ("tp", "sp"))
    for phase in ("forward", "backward"):
        found = copied_bytes(block_of(family), phase, point, num_ranks)
        assert found == real.copied[phase] - whole.copied[phase]
        assert (found > 0) is (num_ranks > 1)


def charged_bytes(block: Block, phase: str, point: Point, num_ranks: int) -> int:
    """What operations other than products and attention move, by the seconds they are charged."""
    seconds = device_cost(replace(block, params=()), TORCH)[f"{phase}_s"]
    laws = dict.fromkeys((sym.GEMM, sym.ATTENTION_FORWARD, sym.ATTENTION_BACKWARD), lambda *_: 0)
    laws |= dict.fromkeys(MEMORY.values(), lambda num_bytes, _: num_bytes)
    for law, found in laws.items():
        seconds = seconds.replace(law, found)
    scales = {figure(TORCH.runtime, f"kernels.{name}_time_scale"): 1 for name in SCALES}
    return int(seconds.subs(scales | {B: point[0], S: point[1], T: num_ranks}))


@pytest.mark.parametrize("point", POINTS, ids=str)
@pytest.mark.parametrize("num_ranks", DEGREES)
@pytest.mark.parametrize("family", EXCHANGES)
def test_moved_bytes_of_divided_sequence_are_dtensors(
    family: str, num_ranks: int, point: Point
) -> None:
    """Whole: gradients of what entered, until they are one sum, and those that biases are given.

    Besides products, attention and concatenations. A rank reads weights of norms whole, of which
    it is charged a share, and DTensor divides biases of sums by t: less than `VECTORS` of HIDDEN
    numbers in fp32. Where a rank has one head the trace has a copy that torch spares.
    """
    block, real = block_of(family), ranks(point, family)[family, "sp", num_ranks]
    for phase in ("forward", "backward"):
        skipped = {"aten.cat"} | ({"aten.clone"} if num_ranks == 8 else set())
        ops = tuple(op for op in block.ops if op.name not in skipped)
        found = charged_bytes(replace(block, ops=ops), phase, point, num_ranks)
        expected = sum(size for name, size in real.moved[phase].items() if name not in skipped)
        assert 0 <= expected - found < VECTORS * HIDDEN * 4


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", DEGREES)
@pytest.mark.parametrize("family", PARTLY + ROWS)
def test_rank_of_a_layer_with_whole_tokens_is_exact(family: str, num_ranks: int) -> None:
    block, real = block_of(family), ranks(TYPICAL, *PARTLY, *ROWS)[family, "tp", num_ranks]
    assert at(block.flop("forward"), TYPICAL, num_ranks) == real.forward_flop
    assert at(block.flop("backward"), TYPICAL, num_ranks) == real.backward_flop
    assert at(rank_params(block.params), TYPICAL, num_ranks) == real.num_params
    assert storages(block, TYPICAL, num_ranks) == [tuple(each) for each in real.saved]
    assert collectives(block, "tp", num_ranks) == real.collectives


@pytest.mark.slow
def test_a_norm_over_all_heads_adds_up_its_means() -> None:
    """An fp32 number for each token, of queries and of keys; each has a gradient."""
    block = block_of("olmo2")
    for sp in (False, True):
        rows = block.collectives(sequence_parallel=sp)
        found = [(c.kind, c.phase, c.count) for c in rows if c.bytes == 4 * B * S]
        assert found == [("all_reduce", "forward", 2), ("all_reduce", "backward", 2)]


def test_a_transformer_layer_exchanges_twice_each_way() -> None:
    """2 + 2 all-reduces a layer (Shoeybi et al. 2019), or 2 + 2 pairs (Korthikanti et al. 2022)."""
    block = block_of("llama")
    rows = [(c.kind, c.phase, c.count) for c in block.collectives(sequence_parallel=False)]
    assert rows == [("all_reduce", "forward", 2), ("all_reduce", "backward", 2)]
    pairs = [(c.kind, c.count) for c in block.collectives(sequence_parallel=True)]
    assert pairs == [("all_gather", 2), ("reduce_scatter", 2)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", DEGREES)
def test_one_head_a_rank_keeps_one_copy_less(num_ranks: int) -> None:
    """A known difference, to the safe side, where t is the number of heads.

    GPT-NeoX keeps attention's result twice: as the kernel wrote it [b, heads / t, s, d], and copied
    to [b * s, h / t] for the projection. With one head both are the same memory, and torch copies
    nothing; the trace, where heads / t is a symbol, does.
    """
    block = block_of("gpt-neox-8-heads")
    real = ranks(TYPICAL, "gpt-neox-8-heads")["gpt-neox-8-heads", "tp", num_ranks]
    copies = [("torch.bfloat16", 2 * TYPICAL[0] * TYPICAL[1] * HIDDEN // num_ranks)]
    known = copies if num_ranks == 8 else []
    assert storages(block, TYPICAL, num_ranks) == sorted([*map(tuple, real.saved), *known])
