"""How operations are priced, as a plan tells it: law, table, own table; the weakest kind."""

from dataclasses import replace

import pytest

from mist.plans.numerics import NUMERICS
from mist.plans.plan import OpCost
from mist.plans.provenance import Kind, weakest
from mist.plans.workload import Precision
from mist.platform import OpCosts, Quantity, op_costs
from mist.platform.op_tables import OpTable, TabledOp
from tests.platform.samples import costs

H100 = costs("h100-sxm")


def rows(costs: OpCosts, num_gpus: int = 16, num_nodes: int = 2) -> dict[str, tuple[str, Kind]]:
    """By what and how sure each kind of operation is priced."""
    found = op_costs(costs, num_gpus=num_gpus, num_nodes=num_nodes)
    assert len({row.what for row in found}) == len(found)
    return {row.what: (row.how, row.kind) for row in found}


def with_table(op: TabledOp, *, own: bool, kind: Kind = Kind.MEASURED) -> OpCosts:
    attention = op is not TabledOp.GEMM
    sizes = ("sequences", "seq", "head_dim") if attention else ("m", "n", "k")
    table = OpTable(
        columns=(*sizes, "us"), rows=((64, 64, 64, 5),), source="a test", kind=kind, own=own
    )
    return replace(H100, device=replace(H100.device, tables={op: {Precision.BF16: table}}))


def test_the_rows_of_h100s() -> None:
    # kinds as in profiles/devices/h100-sxm.yaml, clusters/dgx-h100.yaml and runtimes/torch.yaml
    assert rows(H100) == {
        "matrix products": ("law", Kind.FIT),
        "attention forward": ("law", Kind.GUESS),
        "attention backward": ("law", Kind.GUESS),
        "memory-bound operations": ("law", Kind.GUESS),
        "collectives in a node": ("table", Kind.MEASURED),
        "transfers in a node": ("law", Kind.FIT),
        "collectives and transfers between nodes": ("law", Kind.GUESS),
        "copies between host and device": ("law", Kind.GUESS),
        "streams at once": ("law", Kind.GUESS),
    }


def test_a_row_has_the_source_of_its_weakest_figure() -> None:
    (products, *_) = op_costs(costs("l4"), num_gpus=1, num_nodes=1)
    assert products == OpCost(
        what="matrix products",
        how="law",
        source="NVIDIA aiconfigurator 0.12.0 (Apache-2.0), l40s: the same architecture",
        kind=Kind.GUESS,
    )


def test_one_gpu_exchanges_nothing_and_one_node_has_no_network() -> None:
    assert [what for what in rows(H100, 1, 1) if "node" in what] == []
    assert [what for what in rows(H100, 8, 1) if "node" in what] == [
        "collectives in a node",
        "transfers in a node",
    ]


def test_groups_with_a_link_and_no_column_have_their_own_row() -> None:
    found = rows(costs("l40s"))  # pcie-box
    assert found["collectives in a node"] == ("table", Kind.MEASURED)
    assert found["collectives in a node of 4, 8 ranks"] == ("law", Kind.GUESS)
    assert rows(costs("l4"))["collectives in a node"] == ("law", Kind.GUESS)  # links only


def test_measured_contention_takes_the_place_of_the_runtimes_slowdown() -> None:
    assert rows(costs("l4"))["streams at once"] == ("law", Kind.FIT)


@pytest.mark.parametrize(("own", "how"), [(False, "table"), (True, "measured")])
def test_a_table_takes_the_place_of_the_law(own: bool, how: str) -> None:
    found = rows(with_table(TabledOp.GEMM, own=own))
    assert found["matrix products"] == (how, Kind.MEASURED)
    assert found["attention forward"] == ("law", Kind.GUESS)


def test_the_backward_law_stretches_the_table_of_the_forward_kernel() -> None:
    found = rows(with_table(TabledOp.ATTENTION_FORWARD, own=True))
    assert found["attention forward"] == ("measured", Kind.MEASURED)
    assert found["attention backward"] == ("law", Kind.MEASURED)  # no guess enters any more


def test_products_in_fp8_are_by_the_law_of_fp8() -> None:
    (products, *_) = op_costs(
        replace(with_table(TabledOp.GEMM, own=True), numerics=NUMERICS["fp8"]),
        num_gpus=1,
        num_nodes=1,
    )
    assert (products.how, "fp8" in products.source) == ("law", True)


def test_a_calibrated_scale_is_a_figure_of_laws_and_tables() -> None:
    scale = Quantity(value=1.1, source="14 runs", kind=Kind.CALIBRATED)
    tabled = with_table(TabledOp.GEMM, own=False)
    for cost in (H100, tabled):
        scaled = replace(cost, device=replace(cost.device, tensor_time_scale=scale))
        (products, *_) = op_costs(scaled, num_gpus=1, num_nodes=1)
        assert (products.source, products.kind) == ("14 runs", Kind.CALIBRATED)


def test_the_weakest_is_the_first_of_the_least_sure() -> None:
    kinds = (Kind.SPEC, Kind.FIT, Kind.MEASURED, Kind.CALIBRATED, Kind.GUESS)
    figures = [Quantity(value=i, source="test", kind=kind) for i, kind in enumerate(kinds)]
    for count in range(1, 6):
        assert weakest(figures[:count]) == figures[count - 1]
    assert weakest([figures[2], replace(figures[2], value=9.0), figures[0]]) == figures[2]
