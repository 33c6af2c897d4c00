"""Tables of operations: power laws, hand values, the border, and rows held out of a real one."""

import csv
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mist.errors import PlatformError
from mist.plans.numerics import NUMERICS
from mist.plans.provenance import Kind
from mist.plans.workload import Precision
from mist.platform import OpCosts, Quantity, load_platform
from mist.platform.listing import figure_rows
from mist.platform.op_tables import AXES, OpTable, TabledOp
from mist.platform.profiles import load_device
from tests.platform.samples import PROFILES, PUBLISHED, costs

Times = Mapping[tuple[float, ...], float]
M, N, K = (256.0, 1024.0, 8192.0), (512.0, 4096.0), (128.0, 1024.0, 2048.0)
inside = st.tuples(*(st.floats(sizes[0], sizes[-1]) for sizes in (M, N, K)))


def table_of(op: TabledOp, times_us: Times) -> OpTable:
    rows = tuple((*sizes, us) for sizes, us in times_us.items())
    columns = (*AXES[op].names, "us")
    return OpTable(columns=columns, rows=rows, source="a test", kind=Kind.MEASURED)


def with_table(op: TabledOp, times_us: Times, gpu: str = "l4") -> OpCosts:
    """Costs of a shipped device with a bf16 table of one operation."""
    tables = {op: {Precision.BF16: table_of(op, times_us)}}
    return replace(costs(gpu), device=replace(costs(gpu).device, tables=tables))


def grid(time_us: Callable[[float, float, float], float]) -> dict[tuple[float, ...], float]:
    return {sizes: time_us(*sizes) for sizes in product(M, N, K)}


def power_us(m: float, n: float, k: float) -> float:
    return 0.01 * m**0.9 * n**1.1 * k**0.7


POWER = with_table(TabledOp.GEMM, grid(power_us))


@given(sizes=inside)
def test_a_power_law_is_met_everywhere_inside(sizes: tuple[float, float, float]) -> None:
    # linear in logarithms, so interpolation is exact up to rounding
    assert float(POWER.gemm_s(1, *sizes)) * 1e6 == pytest.approx(power_us(*sizes), rel=1e-9)


def test_points_of_the_grid_are_met_in_any_order_of_rows() -> None:
    rng = np.random.default_rng(1)
    times = {sizes: float(rng.uniform(1, 100)) for sizes in product(M, N, K)}
    shuffled = dict(sorted(times.items(), key=lambda item: item[1]))
    cost = with_table(TabledOp.GEMM, shuffled)
    for sizes, us in times.items():
        assert float(cost.gemm_s(1, *sizes)) * 1e6 == pytest.approx(us, rel=1e-9)


def test_between_points_by_hand() -> None:
    # Halfway between 1024 and 4096 in logarithms is 2048, and between 10 and 90 us is 30 us; a
    # quarter of the way (1448.2) gives 10 * 9^(1/4) = 17.32 us. Halfway along m and n is the
    # geometric mean of four corners: (10 * 90 * 20 * 40)^(1/4) = 29.130 us.
    cost = with_table(
        TabledOp.GEMM,
        {(1024, 64, 8): 10, (4096, 64, 8): 90, (1024, 256, 8): 20, (4096, 256, 8): 40},
    )
    times = cost.gemm_s(1, [2048, 1024 * 2**0.5, 2048], [64, 64, 128], 8)
    assert times * 1e6 == pytest.approx([30, 17.3205, 29.1295], rel=1e-5)


@given(sizes=inside, axis=st.integers(0, 2), is_upper=st.booleans())
def test_no_step_at_the_border(
    sizes: tuple[float, float, float], axis: int, is_upper: bool
) -> None:
    edge = (M, N, K)[axis][-1 if is_upper else 0]
    beside = [
        tuple(edge * near if i == axis else size for i, size in enumerate(sizes))
        for near in (1 - 1e-7, 1.0, 1 + 1e-7)
    ]
    times = POWER.gemm_s(1, *np.array(beside).T)
    assert times == pytest.approx([times[1]] * 3, rel=1e-6)


@given(sizes=st.tuples(*[st.floats(1, 1e6)] * 3), batch=st.sampled_from([1, 16]))
def test_beyond_the_border_and_for_a_batch_the_law_goes_on(
    sizes: tuple[float, float, float], batch: int
) -> None:
    law = costs("l4")
    nearest = [
        np.clip(size, axis[0], axis[-1]) for size, axis in zip(sizes, (M, N, K), strict=True)
    ]
    expected = POWER.gemm_s(1, *nearest) * law.gemm_s(batch, *sizes) / law.gemm_s(1, *nearest)
    assert float(POWER.gemm_s(batch, *sizes)) == pytest.approx(float(expected), rel=1e-9)


@given(
    steps=st.lists(st.floats(0.0, 50.0), min_size=18, max_size=18),
    sizes=inside,
    further=inside,
)
def test_a_table_that_rises_gives_times_that_rise(
    steps: list[float], sizes: tuple[float, ...], further: tuple[float, ...]
) -> None:
    cube = np.array(steps).reshape(3, 2, 3) + 0.1
    rising = cube.cumsum(0).cumsum(1).cumsum(2)
    cost = with_table(TabledOp.GEMM, dict(zip(product(M, N, K), rising.ravel(), strict=True)))
    larger = [max(pair) for pair in zip(sizes, further, strict=True)]
    # a billionth for the rounding of logarithms
    assert float(cost.gemm_s(1, *sizes)) <= float(cost.gemm_s(1, *larger)) * (1 + 1e-9)


def test_the_calibrated_scale_stretches_a_table_too() -> None:
    # 1.25 times every time; the law's own scale cancels in its ratio, beyond the grid as well
    scale = Quantity(value=1.25, source="runs", kind=Kind.CALIBRATED)
    scaled = replace(POWER, device=replace(POWER.device, tensor_time_scale=scale))
    sizes = (np.array([1.0, 1.0, 16.0]), np.array([1024.0, 1e5, 1e5]), 4096, 1024)
    assert scaled.gemm_s(*sizes) == pytest.approx(1.25 * POWER.gemm_s(*sizes))


def test_other_operations_and_precisions_keep_their_laws() -> None:
    for precision in (Precision.FP16, Precision.FP32):
        assert replace(POWER, numerics=NUMERICS[precision]).gemm_s(2, 300, 300, 300) == costs(
            "l4", precision
        ).gemm_s(2, 300, 300, 300)
    args = (2, 16, 2048, 2048, 128, 1)
    assert POWER.attention_forward_s(*args) == costs("l4").attention_forward_s(*args)


def test_products_in_fp8_have_no_table() -> None:
    tabled = replace(
        with_table(TabledOp.GEMM, grid(power_us), "h100-sxm"), numerics=NUMERICS["fp8"]
    )
    law = replace(costs("h100-sxm"), numerics=NUMERICS["fp8"])
    assert tabled.gemm_s(1, 1024, 4096, 1024) == law.gemm_s(1, 1024, 4096, 1024)


FLASH = {(16, 2048, 128): 473.0, (128, 2048, 128): 3292.0}  # the ends of the L4's own points


def test_attention_by_sequences_with_the_rest_by_law() -> None:
    law, cost = costs("l4"), with_table(TabledOp.ATTENTION_FORWARD, FLASH)
    point = (1, 16, 2048, 2048, 128, 1)
    for args in (point, (8, 16, 2048, 2048, 128, 1), (2, 64, 2048, 2048, 128, 1)):
        us = 473.0 if args == point else 3292.0
        assert float(cost.attention_forward_s(*args)) * 1e6 == pytest.approx(us)
    for args in (
        (1, 16, 2048, 2048, 128, 0),
        (1, 16, 64, 2048, 128, 1),
        (1, 16, 4096, 4096, 64, 1),
    ):
        ratio = law.attention_forward_s(*args) / law.attention_forward_s(*point)
        assert float(cost.attention_forward_s(*args)) * 1e6 == pytest.approx(473.0 * float(ratio))


def test_the_backward_kernel_follows_the_table_of_the_forward_one() -> None:
    args = (1, 16, 2048, 2048, 128, 1)
    cost = with_table(TabledOp.ATTENTION_FORWARD, FLASH)
    ratio = costs("l4").attention_backward_s(*args) / costs("l4").attention_forward_s(*args)
    assert float(cost.attention_backward_s(*args)) * 1e6 == pytest.approx(473.0 * float(ratio))
    own = with_table(TabledOp.ATTENTION_BACKWARD, {(16, 2048, 128): 1272.0})
    assert float(own.attention_backward_s(*args)) * 1e6 == pytest.approx(1272.0)


def test_results_broadcast_over_candidates() -> None:
    assert POWER.gemm_s(1, np.ones((3, 1)), np.full(4, 512), 8).shape == (3, 4)
    assert POWER.gemm_s(1, 300, 600, 200).dtype == np.float64


published = pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason="the published tables are not beside the repository"
)


def l4_rows(op: str) -> list[tuple[list[int], float, float]]:
    """Sizes of the tensors, and forward and backward us, of one operation of ops_l4.csv."""
    with (PUBLISHED / "ops_l4.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["op"] == op]
    assert rows, f"ops_l4.csv has no {op}"
    return [
        (
            [int(size) for size in re.findall(r"\d+(?=[,\]])", row["tensors"])],
            1e6 * float(row["fwd_median_s"]),
            1e6 * float(row["bwd_median_s"]),
        )
        for row in rows
    ]


def product_errors(times: Times, cost: OpCosts) -> list[float]:
    predicted = cost.gemm_s(1, *np.array(list(times)).T) * 1e6
    return list(np.abs(predicted / np.array(list(times.values())) - 1.0))


@published
def test_l4_linear_layers_that_are_held_out() -> None:
    """Inner columns and rows of a 4 x 4 grid, each left out by itself: 1.5 % (median).

    The law misses the same rows by 0.7 %: it was fitted to them, the table has not seen them. Of
    the column that lies off the law, n = 6144 (2.6 %), the table misses 1.2 %.
    """
    linear = {(b * s, n, k): us for (b, s, k, n, _), us, _ in l4_rows("fused_dense_func")}
    square = {sizes: us for sizes, us in linear.items() if sizes[2] == 2048}
    by_table: dict[int, list[float]] = {}
    by_law: dict[int, list[float]] = {}
    for axis, size in ((0, 4096), (0, 8192), (1, 6144), (1, 8192)):
        kept = {sizes: us for sizes, us in square.items() if sizes[axis] != size}
        held = {sizes: us for sizes, us in square.items() if sizes[axis] == size}
        key = size if axis else -size
        by_table[key] = product_errors(held, with_table(TabledOp.GEMM, kept))
        by_law[key] = product_errors(held, costs("l4"))
    table, law = (np.concatenate(list(errors.values())) for errors in (by_table, by_law))
    assert table.size == 16
    assert np.median(table) == pytest.approx(0.015, abs=0.001)
    assert np.median(law) == pytest.approx(0.007, abs=0.001)
    assert np.median(by_table[6144]) < 0.5 * np.median(by_law[6144])


@published
def test_l4_attention_that_is_held_out() -> None:
    """2 and 4 of 1, 2, 4 and 8 sequences of 16 heads: the table misses them by less than the law.

    The law of the backward kernel has the ratio of other GPUs: 2.8 and 1.6 % against 0.8 and 0.6.
    The law of the forward kernel was fitted to all four points (1.2 and 1.9 % of these), and the
    time is no power of the sequences: the table of the two ends misses them by 4.5 %.
    """
    rows = [(sizes[0], *us) for sizes, *us in l4_rows("flash_attn_qkvpacked_func")]
    ends, held = (
        [row for row in rows if row[0] in (1, 8)],
        [row for row in rows if row[0] in (2, 4)],
    )
    forward = with_table(TabledOp.ATTENTION_FORWARD, {(16 * b, 2048, 128): us for b, us, _ in ends})
    backward = with_table(
        TabledOp.ATTENTION_BACKWARD, {(16 * b, 2048, 128): us for b, _, us in ends}
    )
    for batch, forward_us, backward_us in held:
        args = (batch, 16, 2048, 2048, 128, 1)
        by_table = float(backward.attention_backward_s(*args)) * 1e6 / backward_us
        by_law = float(costs("l4").attention_backward_s(*args)) * 1e6 / backward_us
        assert abs(by_table - 1) < 0.009
        assert abs(by_law - 1) > 0.015
        assert float(forward.attention_forward_s(*args)) * 1e6 == pytest.approx(
            forward_us, rel=0.046
        )


GEMM_TABLE = """
tables:
  gemm:
    bf16:
      source: "mist profile, a test"
      kind: measured
      own: true
      columns: [m, n, k, us]
      rows:
        - [1024, 1024, 1024, 40]
        - [8192, 1024, 1024, 300]
"""


def profile(tmp_path: Path, tables: str) -> Path:
    path = tmp_path / "mine.yaml"
    # A device without a calibration, which would scale the table.
    path.write_text((PROFILES / "devices" / "a10g.yaml").read_text() + tables)
    return path


def test_a_profile_with_a_table_is_priced_by_it(tmp_path: Path) -> None:
    path = profile(tmp_path, GEMM_TABLE)
    platform = load_platform(num_gpus=1, gpu=str(path), cluster=None, runtime="torch")
    cost = replace(costs("l4"), device=platform.device)
    assert float(cost.gemm_s(1, 8192, 1024, 1024)) == pytest.approx(300e-6)


def test_the_listing_shows_a_table_by_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = tmp_path / "mist" / "profiles" / "devices"
    folder.mkdir(parents=True)
    profile(folder, GEMM_TABLE)
    (row,) = [row for row in figure_rows("mine") if row.path.startswith("tables")]
    assert (row.path, row.value, row.unit) == ("tables.gemm.bf16", None, "2 x 1 x 1 times")
    assert (row.kind, row.source) == (Kind.MEASURED, "mist profile, a test")


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        pytest.param(
            "[m, n, k, us]",
            "[m, k, n, us]",
            ".: tables.gemm.bf16: columns must be m, n, k, us, found m, k, n, us",
            id="columns",
        ),
        pytest.param(
            "  gemm:\n",
            "  attention_forward:\n",
            ".: tables.attention_forward.bf16: columns must be sequences, seq, head_dim, us, "
            "found m, n, k, us",
            id="columns of another operation",
        ),
        pytest.param(
            "[8192, 1024, 1024, 300]",
            "[8192, 1024, 300]",
            "tables.gemm.bf16: rows must be of 4 numbers each",
            id="short row",
        ),
        pytest.param(
            "1024, 300]",
            "1024, 0]",
            "tables.gemm.bf16: sizes and times must be positive",
            id="no time",
        ),
        pytest.param(
            "1024, 300]",
            "1024, .inf]",
            "tables.gemm.bf16.rows[1][3]: Input should be a finite number (found inf)",
            id="infinite time",
        ),
        pytest.param(
            "[8192, 1024, 1024, 300]",
            "[8192, 2048, 1024, 300]",
            "tables.gemm.bf16: a grid of 2 x 2 x 1 sizes has 4 rows, all different; "
            "found 2, 2 of them different",
            id="hole",
        ),
        pytest.param(
            "[8192, 1024, 1024, 300]",
            "[1024, 1024, 1024, 300]",
            "tables.gemm.bf16: a grid of 1 x 1 x 1 sizes has 1 rows, all different; "
            "found 2, 1 of them different",
            id="point twice",
        ),
        pytest.param(
            '"mist profile, a test"',
            '" "',
            "tables.gemm.bf16: source is empty: say where the times come from",
            id="no source",
        ),
        pytest.param(
            "    bf16:",
            "    bf8:",
            "tables.gemm.bf8.[key]: Input should be 'bf16', 'fp16' or 'fp32' (found 'bf8')",
            id="unknown precision",
        ),
        pytest.param(
            "      own: true",
            "      mine: true",
            "tables.gemm.bf16.mine: unknown key",
            id="unknown key",
        ),
    ],
)
def test_a_broken_table_names_its_fault(tmp_path: Path, old: str, new: str, fault: str) -> None:
    assert GEMM_TABLE.count(old) == 1
    path = profile(tmp_path, GEMM_TABLE.replace(old, new))
    with pytest.raises(PlatformError) as refusal:
        load_device(str(path))
    assert str(refusal.value) == f"{path} has 1 fault:\n  {fault}"


def test_a_table_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^rows is empty: a grid has at least one point$"):
        table_of(TabledOp.GEMM, {})
