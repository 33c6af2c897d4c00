"""The compiled stage cost against a plain simulation, known formulas and a dimensional check."""

import itertools
import math
from functools import cache

import numpy as np
import pint
import pytest
import sympy

from mist.symbolic.columns import NO_OFFLOAD, position_columns, strategy_columns
from mist.symbolic.job import Job
from mist.symbolic.program import TIME_PARTS
from mist.symbolic.stage import stage_cost
from tests.fast_cases import first_fast
from tests.oracle import Rank, simulate
from tests.toys import adamw_setting, count_columns, toy_graph, toy_job, toy_platform

LAYOUTS = [
    # (num_gpus, num_stages, tp, zero, micro_batch)
    (8, 1, 1, 0, 2),
    (8, 1, 1, 3, 1),
    (8, 1, 2, 2, 4),
    (8, 2, 2, 1, 1),
    (8, 4, 2, 0, 2),
    (16, 2, 4, 3, 2),
    (16, 4, 1, 2, 1),
    (16, 4, 4, 1, 4),
]


Counts = tuple[int, int, int] | tuple[int, int, int, int]


def judged(
    job: Job,
    rows: dict[str, int],
    counts: list[Counts],
    offload: dict[str, float] = NO_OFFLOAD,  # type: ignore[assignment]
) -> dict[str, np.ndarray]:
    """Stage outputs of equal stages with these (first, count, num_full[, num_selective])."""
    num_stages = len(counts)
    per_stage = job.platform.num_gpus // num_stages
    dp = per_stage // rows["tp"]
    knobs = {**rows, "dp": dp, **offload}
    strategy = strategy_columns(job.placement, knobs, num_stages=num_stages)
    first, count, full, some = np.array([(*row, 0)[:4] for row in counts]).T
    devices = np.array([(i * per_stage, per_stage) for i in range(num_stages)])
    return job.cost.stage(
        {
            **job.cost.terms(strategy),
            **position_columns(job.placement, devices, count, rows["num_micro_batches"]),
            **count_columns(job, first, (count - full - some, some, full)),
        }
    )


@cache
def job_of(index: int, num_gpus: int) -> Job:
    """A toy job of one of the graphs: compiled once."""
    return toy_job(GRAPHS[index], num_gpus)


GRAPHS = [
    toy_graph((8,)),  # so small that the host's launches decide
    toy_graph((8,), hidden=16384),  # large enough that the device decides
    toy_graph((3, 5)),
    toy_graph((8,), tied=True),
]


OFFLOADS = [
    {},
    {"optimizer": 0.25},
    {"activations": 0.5, "optimizer": 1.0},
    {"weights": 0.5, "grads": 0.5, "activations": 1.0},
]


@pytest.mark.parametrize(
    "offload", first_fast(OFFLOADS[::-1], 2), ids=lambda ratios: "+".join(ratios) or "none"
)
@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize(("num_gpus", "num_stages", "tp", "zero", "micro_batch"), LAYOUTS)
def test_stage_cost_equals_simulation(
    index: int,
    num_gpus: int,
    num_stages: int,
    tp: int,
    zero: int,
    micro_batch: int,
    offload: dict[str, float],
) -> None:
    strategy = {"tp": tp, "zero": zero, "micro_batch": micro_batch}
    assert_simulated(index, num_gpus, num_stages, strategy, offload)


@pytest.mark.parametrize("offload", OFFLOADS[:3], ids=lambda ratios: "+".join(ratios) or "none")
@pytest.mark.parametrize(
    ("num_stages", "tp", "zero", "copies"),
    [(1, 1, 3, 2), (1, 2, 2, 2), (1, 1, 1, 4), (2, 1, 3, 4), (1, 2, 2, 4), (1, 1, 3, 8)],
)
def test_copies_of_the_states_equal_simulation(
    num_stages: int, tp: int, zero: int, copies: int, offload: dict[str, float]
) -> None:
    """On two nodes: copies on nodes of their own, in one node, and across both."""
    strategy = {"tp": tp, "zero": zero, "micro_batch": 1, "dp_replicate": copies}
    assert_simulated(2, 16, num_stages, strategy, offload)


def assert_simulated(
    index: int, num_gpus: int, num_stages: int, strategy: dict[str, int], offload: dict[str, float]
) -> None:
    """With one micro-batch, fewer than the longest pipeline has stages, and more."""
    for num_micro_batches in (1, 3, 8):
        rows = strategy | {"num_micro_batches": num_micro_batches}
        assert_stages_simulated(index, num_gpus, num_stages, rows, offload)


def assert_stages_simulated(
    index: int, num_gpus: int, num_stages: int, rows: dict[str, int], offload: dict[str, float]
) -> None:
    graph, job = GRAPHS[index], job_of(index, num_gpus)
    counts: list[Counts] = [
        (i * 8 // num_stages, 8 // num_stages, (i + 1) % 2, i % 2) for i in range(num_stages)
    ]
    got = judged(job, rows, counts, offload)
    kinds = graph.layer_kinds()
    for stage, (first, count, full, some) in enumerate(counts):
        rank = Rank(
            platform=job.platform,
            workload=job.workload,
            micro_batch=rows["micro_batch"],
            tp=rows["tp"],
            dp=num_gpus // num_stages // rows["tp"],
            zero=rows["zero"],
            stage=stage,
            num_stages=num_stages,
            num_micro_batches=rows["num_micro_batches"],
            first_device=stage * num_gpus // num_stages,
            offload=offload,
            copies=rows.get("dp_replicate", 1),
        )
        levels = ["full"] * full + ["selective"] * some + ["none"] * (count - full - some)
        layers = [(graph.blocks[kinds[first + i]], level) for i, level in enumerate(levels)]
        want = simulate(rank, layers, graph)
        for name in ("stable_s", "lone_s", "peak_bytes", "host_bytes"):
            assert got[name][stage] == pytest.approx(getattr(want, name), rel=1e-12)


def test_states_are_divided_by_the_ranks_of_a_copy() -> None:
    """16/N of ZeRO-3, N = 16 ranks in 2 copies = 8."""
    graph, rows = GRAPHS[0], {"tp": 1, "zero": 3, "micro_batch": 1, "num_micro_batches": 8}
    found = judged(job_of(0, 16), rows | {"dp_replicate": 2}, [(0, 8, 0)])["states_bytes"][0]
    assert found == pytest.approx(16 / 8 * graph.num_params)


def test_a_copy_in_each_node_gathers_faster_and_sums_once_a_step() -> None:
    graph, rows = GRAPHS[0], {"tp": 1, "zero": 3, "micro_batch": 1, "num_micro_batches": 8}
    whole = judged(job_of(0, 16), rows, [(0, 8, 0)])
    copies = judged(job_of(0, 16), rows | {"dp_replicate": 2}, [(0, 8, 0)])
    assert copies["dp_s"][0] < whole["dp_s"][0]
    size = 4 * graph.blocks[0].num_params  # fp32, of which each of 8 ranks sums an eighth
    laws = job_of(0, 16).laws
    sums = 8 * float(laws.all_reduce_s(size / 8, 2, 1))
    one = judged(job_of(0, 8), rows, [(0, 8, 0)])
    more = (copies["lone_s"] - copies["stable_s"]) - (one["lone_s"] - one["stable_s"])
    assert 0 < more[0] <= 2 * sums  # once, beside compute, and once more at the end


def test_parts_sum_to_the_whole() -> None:
    job = toy_job(num_gpus=8)
    rows = {"tp": 2, "zero": 3, "micro_batch": 2, "num_micro_batches": 8}
    got = judged(job, rows, [(0, 5, 2), (5, 3, 0)])
    time = sum(got[f"{part}_s"] for part in TIME_PARTS)
    memory = sum(
        got[f"{part}_bytes"]
        for part in ("states", "activations", "working", "gathered", "buffers", "allocator")
    )
    np.testing.assert_allclose(time, got["stable_s"], rtol=1e-12)
    np.testing.assert_allclose(memory, got["peak_bytes"], rtol=1e-12)


def test_states_match_fsdp2_bytes_per_parameter() -> None:
    """design: ZeRO-3 16/N, ZeRO-2 16/N + 2, ZeRO-1 12/N + 2 + 4, ZeRO-0 18 bytes per parameter."""
    graph = toy_graph((8,))
    job = toy_job(graph, 8)
    for zero, per_param in enumerate((18.0, 12 / 8 + 6, 16 / 8 + 2, 16 / 8)):
        rows = {"tp": 1, "zero": zero, "micro_batch": 1, "num_micro_batches": 8}
        states = judged(job, rows, [(0, 8, 0)])["states_bytes"][0]
        assert states == pytest.approx(per_param * graph.num_params)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_memory_never_rises_with_recomputation_and_time_never_falls(zero: int) -> None:
    job = toy_job(num_gpus=8)
    rows = {"tp": 2, "zero": zero, "micro_batch": 2, "num_micro_batches": 8}
    stages = [judged(job, rows, [(0, 8, full)]) for full in range(9)]
    peaks = [stage["peak_bytes"][0] for stage in stages]
    times = [stage["stable_s"][0] for stage in stages]
    assert peaks[1:] == sorted(peaks[1:], reverse=True)
    assert times == sorted(times)


def test_states_never_rise_with_zero_level_or_tp() -> None:
    job = toy_job(num_gpus=8)
    states = {}
    for tp, zero in itertools.product((1, 2, 4, 8), range(4)):
        rows = {"tp": tp, "zero": zero, "micro_batch": 1, "num_micro_batches": 8}
        states[tp, zero] = judged(job, rows, [(0, 8, 0)])["states_bytes"][0]
    for tp in (1, 2, 4, 8):
        by_zero = [states[tp, zero] for zero in range(4)]
        assert by_zero == sorted(by_zero, reverse=True)
    for zero in range(4):
        by_tp = [states[tp, zero] for tp in (1, 2, 4, 8)] if zero == 0 else []
        assert by_tp == sorted(by_tp, reverse=True)


def test_dimensions() -> None:
    """Seconds stay seconds and bytes bytes through every formula (pint, a bare registry)."""
    units = pint.UnitRegistry(None)
    units.define("second = [time]")
    units.define("byte = [memory]")
    units.define("param = [parameters]")
    platform = toy_platform()
    graph = toy_graph((3, 5), tied=True)
    cost = stage_cost(graph, adamw_setting(platform.runtime))
    formulas = {**cost.terms, **cost.stage}
    del formulas["tied_params"], formulas["tied_trainable_params"]  # numbers of the model
    for name, expr in formulas.items():
        quantity = _evaluate(expr, units)
        expected = _unit(name, units)
        assert quantity is None or quantity.is_compatible_with(expected), f"{name}: {quantity}"


def _unit(name: str, units: pint.UnitRegistry) -> pint.Unit:
    if name.endswith("_bytes_per_param"):
        return units.byte / units.param
    if name.endswith(("_bytes", "_s")):
        return units.byte if name.endswith("_bytes") else units.second
    if name.endswith("_params"):
        return units.param
    return units.dimensionless


def _evaluate(expr: sympy.Expr, units: pint.UnitRegistry) -> pint.Quantity | None:
    """Walk an expression with units; None is a constant of the profile, whose unit is not here."""
    if expr.is_Symbol:
        return units.Quantity(1.5, _unit(str(expr), units))
    if expr.is_Number:
        return units.Quantity(1.0, units.dimensionless) if expr.is_Integer and expr != 0 else None
    if isinstance(expr, sympy.Piecewise):
        return _like([_evaluate(branch.expr, units) for branch in expr.args])
    name = expr.func.__name__
    if name.endswith("_s"):
        return units.Quantity(1.0, units.second)
    if name in ("ceiling", "floor", "pinned_bytes"):
        return _evaluate(expr.args[0], units)
    args = [_evaluate(arg, units) for arg in expr.args]
    if expr.is_Mul:
        return _product(args)
    if expr.is_Pow:
        assert args[0] is not None
        return args[0] ** int(expr.args[1])
    assert expr.is_Add or name in ("maximum", "minimum"), f"unknown function {name}"
    return _like(args)


def _product(args: list[pint.Quantity | None]) -> pint.Quantity | None:
    """A profile's constant times a bare number may be anything; times a quantity it scales it."""
    known = [arg for arg in args if arg is not None]
    product = math.prod(known[1:], start=known[0]) if known else None
    is_open = len(known) < len(args) and (product is None or product.dimensionless)
    return None if is_open else product


def _like(args: list[pint.Quantity | None]) -> pint.Quantity | None:
    """All of one dimension."""
    known = [arg for arg in args if arg is not None]
    for arg in known[1:]:
        assert arg.is_compatible_with(known[0]), f"{arg.units} beside {known[0].units}"
    return known[0] if known else None
