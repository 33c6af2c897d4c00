"""What is told of a layout that leaves the tables: exact sentences, and only where it matters."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from mist.plans.provenance import Kind
from mist.plans.workload import Precision
from mist.platform import OpCosts, extrapolations
from mist.platform.cluster import Collective
from mist.platform.collectives import CollectiveLaw
from mist.platform.extrapolation import FAR_RATIO
from mist.platform.op_tables import OpTable, TabledOp
from mist.platform.profiles import load_cluster
from mist.units import GIB, MIB
from tests.platform.samples import costs

# The tables of dgx-h100 go from 512 B to 512 MiB, for 2, 4 and 8 ranks.
H100 = costs("h100-sxm")
Prices = Mapping[str, NDArray[np.float64]]


def told(costs: OpCosts, stable_s: Callable[[OpCosts], object]) -> tuple[str, ...]:
    """What is told of a layout of one stage that takes so long."""

    def priced(laws: OpCosts) -> Prices:
        taken = np.atleast_1d(np.asarray(stable_s(laws), dtype=np.float64))
        return {"stable_s": taken, "lone_s": taken}

    return extrapolations(costs, priced)


def with_products(rows: tuple[tuple[float, ...], ...]) -> OpCosts:
    table = OpTable(columns=("m", "n", "k", "us"), rows=rows, source="test", kind=Kind.MEASURED)
    tables = {TabledOp.GEMM: {Precision.BF16: table}}
    return replace(H100, device=replace(H100.device, tables=tables))


PRODUCTS = with_products(((1024, 1024, 1024, 10), (4096, 1024, 1024, 40)))


def test_a_collective_beyond_the_largest_size() -> None:
    assert told(H100, lambda laws: laws.all_gather_s([MIB, 2.1 * GIB], 8, 8)) == (
        "all-gathers of 2.1 GiB are priced beyond the largest measured size, 512.0 MiB (x4.2)",
    )


def test_exactly_four_times_is_not_far() -> None:
    assert told(H100, lambda laws: laws.all_gather_s(2 * GIB, 8, 8)) == ()


def test_the_farthest_of_several_is_told() -> None:
    sizes = [3 * GIB, 9 * GIB, 5 * GIB]
    assert told(H100, lambda laws: laws.reduce_scatter_s(sizes, 4, 4)) == (
        "reduce-scatters of 9.0 GiB are priced beyond the largest measured size, 512.0 MiB (x18.0)",
    )


def test_a_collective_below_the_smallest_size() -> None:
    assert told(H100, lambda laws: laws.all_reduce_s(64, 8, 8)) == (
        "all-reduces of 64 B are priced below the smallest measured size, 512 B (x8.0)",
    )


@pytest.mark.parametrize(
    "stable_s",
    [
        pytest.param(lambda laws: 1.0 + laws.all_reduce_s(64, 8, 8), id="a thousandth of a step"),
        pytest.param(
            lambda laws: np.maximum(laws.all_gather_s(4 * GIB, 8, 8), 1.0), id="hidden beside"
        ),
        pytest.param(lambda laws: 0.0 * laws.all_gather_s(4 * GIB, 8, 8), id="not in the layout"),
        pytest.param(lambda laws: laws.all_gather_s(4 * GIB, 16, 8), id="the network decides"),
        pytest.param(lambda laws: laws.all_gather_s(4 * GIB, 8, 1), id="no two in a node"),
        pytest.param(lambda laws: laws.all_gather_s(4 * GIB, 1, 1), id="one rank"),
        pytest.param(lambda laws: laws.p2p_s(4 * GIB, 0), id="a law has no edge"),
    ],
)
def test_what_does_not_matter_is_not_told(stable_s: Callable[[OpCosts], object]) -> None:
    assert told(H100, stable_s) == ()


def test_a_group_that_has_a_link_and_no_column_has_no_edge() -> None:
    pcie = costs("l40s")  # pcie-box: a table for 2 ranks, links for 4 and 8
    assert told(pcie, lambda laws: laws.all_gather_s(8 * GIB, 4, 4)) == ()
    assert told(pcie, lambda laws: laws.all_gather_s(8 * GIB, 2, 2)) != ()


def test_products_by_the_axis_that_they_leave() -> None:
    assert told(PRODUCTS, lambda laws: laws.gemm_s(1, 8192, [1024, 128256], 128)) == (
        "matrix products of n 128256 are priced beyond the largest measured size, 1024 (x125.2)",
        "matrix products of k 128 are priced below the smallest measured size, 1024 (x8.0)",
    )


def test_a_product_within_four_times_is_not_told() -> None:
    assert told(PRODUCTS, lambda laws: laws.gemm_s(1, 16384, 4096, 256)) == ()


def test_without_a_table_nothing_is_far() -> None:
    assert told(H100, lambda laws: laws.gemm_s(1, 1e7, 1e7, 1e7)) == ()


@pytest.mark.parametrize(
    ("ratio", "median", "largest"), [(2, 0.040, 0.086), (4, 0.096, 0.194), (8, 0.193, 0.668)]
)
def test_how_far_a_cut_node_table_still_meets_its_last_size(
    ratio: int, median: float, largest: float
) -> None:
    """The reason of FAR_RATIO: 4 systems, 3 collectives, 3 groups; sizes double by rows."""
    errors = []
    for name in ("dgx-a100", "dgx-b200", "dgx-h100", "dgx-h200"):
        whole = load_cluster(name).profile
        for word in Collective:
            table = whole.tables[word]
            kept = table.rows[: -ratio.bit_length() + 1]
            assert table.rows[-1][0] == ratio * kept[-1][0]
            cut = replace(whole, tables={**whole.tables, word: replace(table, rows=kept)})
            law = CollectiveLaw.of(cut, word)
            for group, measured_us in zip(table.groups, table.rows[-1][1:], strict=True):
                seconds = float(law.seconds(table.rows[-1][0], group, group))
                errors.append(abs(seconds * 1e6 / measured_us - 1.0))
    assert len(errors) == 36
    assert np.median(errors) == pytest.approx(median, abs=0.001)
    assert max(errors) == pytest.approx(largest, abs=0.001)
    assert FAR_RATIO == 4.0
