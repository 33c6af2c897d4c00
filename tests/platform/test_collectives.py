"""Collectives against the measured points, points held out, hand-computed cases and invariants."""

import csv
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mist.platform.cluster import Cluster, Collective
from mist.platform.collectives import CollectiveLaw
from mist.platform.profiles import load_cluster
from mist.units import GIB, MIB
from tests.platform.samples import CLUSTERS, PUBLISHED, costs

TABLED = ("dgx-a100", "dgx-b200", "dgx-h100", "dgx-h200")
SYSTEMS = {
    "a100_sxm": "dgx-a100",
    "b200_sxm": "dgx-b200",
    "h100_sxm": "dgx-h100",
    "h200_sxm": "dgx-h200",
}


@cache
def cluster(name: str) -> Cluster:
    return load_cluster(name).profile


def law(name: str, collective: Collective) -> CollectiveLaw:
    return CollectiveLaw.of(cluster(name), collective)


@pytest.mark.parametrize("name", [*TABLED, "pcie-box"])
@pytest.mark.parametrize("collective", Collective)
def test_every_point_of_the_tables_is_met_exactly(name: str, collective: Collective) -> None:
    table = cluster(name).tables[collective]
    points = np.array(table.rows)
    for column, group in enumerate(table.groups, start=1):
        seconds = law(name, collective).seconds(points[:, 0], group, group)
        np.testing.assert_allclose(seconds * 1e6, points[:, column], rtol=1e-9)


@pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason="the published tables are not beside the repository"
)
def test_the_tables_are_the_published_ones() -> None:
    with (PUBLISHED / "nccl_points.csv").open() as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["system"] in SYSTEMS and row["op"] in set(Collective)
        ]
    # 4 systems x 3 collectives x 3 group sizes x 21 sizes
    assert len(rows) == 4 * 3 * 3 * 21
    for row in rows:
        table = cluster(SYSTEMS[row["system"]]).tables[Collective(row["op"])]
        line = next(line for line in table.rows if line[0] == float(row["bytes"]))
        assert line[1 + table.groups.index(int(row["n_gpus"]))] == float(row["us"])


def held_out_errors(name: str, collective: Collective, first: int) -> np.ndarray:
    """Relative errors at every third size from `first` (the ends kept), from the other sizes."""
    whole = cluster(name)
    table = whole.tables[collective]
    asked = [row for row in table.rows[first::3] if row not in (table.rows[0], table.rows[-1])]
    kept = tuple(row for row in table.rows if row not in asked)
    part = replace(whole, tables={**whole.tables, collective: replace(table, rows=kept)})
    points = np.array(asked)
    return np.concatenate(
        [
            CollectiveLaw.of(part, collective).seconds(points[:, 0], group, group)
            / (points[:, column] * 1e-6)
            - 1
            for column, group in enumerate(table.groups, start=1)
        ]
    )


@pytest.mark.parametrize(("first", "median_ratio"), [(0, 0.028), (1, 0.025), (2, 0.036)])
def test_points_held_out_are_met_within_the_published_error(
    first: int, median_ratio: float
) -> None:
    # Published for log-log interpolation with every third size held out: median 2.4 %, over seven
    # NVLink systems. The second third of our four systems is that split; the others are as found.
    errors = np.abs(
        np.concatenate(
            [held_out_errors(name, word, first) for name in TABLED for word in Collective]
        )
    )
    assert np.median(errors) == pytest.approx(median_ratio, abs=0.001)


@pytest.mark.parametrize(
    ("name", "gather", "scatter", "reduce"),
    [
        ("dgx-a100", (77, 167, 205), (71, 180, 213), (95, 197, 222)),
        ("dgx-h100", (110, 282, 335), (123, 293, 336), (145, 362, 445)),
        ("dgx-b200", (126, 427, 617), (135, 431, 613), (138, 422, 704)),
    ],
)
def test_bus_bandwidth_of_eight_at_4_64_and_512_mib(
    name: str, gather: tuple[int, ...], scatter: tuple[int, ...], reduce: tuple[int, ...]
) -> None:
    # GB/s as published for the tables, rounded to 1.
    for collective, published in zip(Collective, (gather, scatter, reduce), strict=True):
        num_bytes = np.array([4, 64, 512]) * MIB
        seconds = law(name, collective).seconds(num_bytes, 8, 8)
        bus = collective.num_passes * 7 / 8 * num_bytes / seconds / 1e9
        np.testing.assert_allclose(bus, published, atol=0.6)


@pytest.mark.parametrize(("group", "gib_per_s"), [(2, 2.964), (4, 4.1635), (8, 4.6832)])
def test_l4_all_gather_agrees_with_the_template_of_the_mist_artifact(
    group: int, gib_per_s: float
) -> None:
    # time = bytes (n - 1) / n / bandwidth, and the artifact's unit is GiB. Its template was fitted
    # to all points of the file, ours to those of one stream alone; they differ by 1.2 %.
    num_bytes = 512 * MIB
    expected_s = num_bytes * (group - 1) / group / (gib_per_s * GIB)
    assert float(costs("l4").all_gather_s(num_bytes, group, group)) == pytest.approx(
        expected_s, rel=0.02
    )


@pytest.mark.parametrize(("group", "measured_s"), [(2, 83.70e-3), (4, 90.46e-3), (8, 94.76e-3)])
def test_l4_all_gather_of_512_mib_as_measured_by_the_mist_authors(
    group: int, measured_s: float
) -> None:
    taken = float(costs("l4").all_gather_s(512 * MIB, group, group))
    assert taken == pytest.approx(measured_s, rel=0.01)


@pytest.mark.parametrize(("nodes", "gib_per_s"), [(2, 3.3215), (4, 2.9659)])
def test_l4_between_nodes_as_fitted_by_the_mist_authors(nodes: int, gib_per_s: float) -> None:
    # Two figures of a busy cloud network, one constant: it lies between them.
    group, num_bytes = 8 * nodes, GIB
    expected_s = num_bytes * (group - 1) / group / (gib_per_s * GIB)
    taken = float(costs("l4").all_gather_s(num_bytes, group, 8))
    assert taken == pytest.approx(expected_s, rel=0.08)


def test_all_reduce_between_nodes_by_hand() -> None:
    # 16 H100 on 2 nodes, 1 GiB: 2 * 15/16 * 2^30 B / (8 * 50e9 * .85 B/s) = 5.9215 ms, and
    # 2 * 16 hops of 10 us = 0.32 ms; inside a node it takes less.
    taken = float(costs("h100-sxm").all_reduce_s(GIB, 16, 8))
    assert taken == pytest.approx(6.2415e-3, rel=1e-4)


def test_all_gather_with_one_rank_per_node_by_hand() -> None:
    # 4 ranks on 4 nodes, 64 MiB: 3/4 * 2^26 / (50e9 * .85) = 1.1843 ms + 4 hops of 10 us.
    taken = float(costs("h100-sxm").all_gather_s(64 * MIB, 4, 1))
    assert taken == pytest.approx(1.2243e-3, rel=1e-4)


def test_a_fast_network_leaves_the_node_as_the_limit() -> None:
    # B200 at 4 MiB: the node's own time is below; at any size the result is at least the node's.
    b200 = costs("b200")
    num_bytes = 2.0 ** np.arange(9, 33)
    assert (b200.all_gather_s(num_bytes, 16, 8) >= b200.all_gather_s(num_bytes, 8, 8)).all()


def test_beyond_the_table_the_last_bandwidth_holds() -> None:
    a100 = costs("a100-sxm-80")
    last, larger = a100.reduce_scatter_s([512 * MIB, 4 * GIB], 8, 8)
    assert larger == pytest.approx(8 * last)


def test_below_the_table_the_latency_holds() -> None:
    a100 = costs("a100-sxm-80")
    assert float(a100.all_gather_s(1, 8, 8)) == float(a100.all_gather_s(512, 8, 8))


@pytest.mark.parametrize("name", CLUSTERS)
@pytest.mark.parametrize("collective", Collective)
def test_nothing_to_send_and_nobody_to_send_to_take_no_time(
    name: str, collective: Collective
) -> None:
    seconds = law(name, collective).seconds([0, MIB, 0, 0], [8, 1, 1, 16], [8, 1, 1, 8])
    assert (seconds == 0).all()


def test_group_sizes_between_the_tables_lie_between_their_times() -> None:
    # 64 MiB on A100, where time rises with the group.
    seconds = costs("a100-sxm-80").all_gather_s(64 * MIB, [2, 3, 4, 6, 8], [2, 3, 4, 6, 8])
    assert (np.diff(seconds) > 0).all()
    # 3 is log2(3) - 1 of the way from 2 to 4, in log time.
    assert seconds[1] == pytest.approx(seconds[0] * (seconds[2] / seconds[0]) ** (np.log2(3) - 1))


@given(
    name=st.sampled_from(CLUSTERS),
    collective=st.sampled_from(Collective),
    ranks=st.tuples(st.integers(1, 1024), st.integers(1, 8)),
    num_bytes=st.floats(MIB, 64 * GIB),
    factor=st.floats(1.0, 16.0),
)
def test_time_never_falls_with_bytes_from_1_mib_up(
    name: str, collective: Collective, ranks: tuple[int, int], num_bytes: float, factor: float
) -> None:
    # Below 1 MiB the measured points themselves fall, by up to 31 % (noise of one burst).
    less, more = law(name, collective).seconds([num_bytes, num_bytes * factor], *ranks)
    assert 0 <= less <= more * (1 + 1e-12)
    assert np.isfinite(more)


@given(
    name=st.sampled_from(CLUSTERS),
    collective=st.sampled_from(Collective),
    num_nodes=st.integers(2, 512),
    per_node=st.sampled_from([1, 2, 4, 8]),
    num_bytes=st.floats(1, 64 * GIB),
)
def test_time_never_falls_with_more_nodes(
    name: str, collective: Collective, num_nodes: int, per_node: int, num_bytes: float
) -> None:
    groups = np.array([num_nodes, num_nodes + 1]) * per_node
    fewer, more = law(name, collective).seconds(num_bytes, groups, per_node)
    assert 0 < fewer <= more


@given(
    name=st.sampled_from(["l4-box", "local-cpu"]),
    collective=st.sampled_from(Collective),
    num_bytes=st.floats(512, 64 * GIB),
)
def test_a_link_is_interpolated_within_a_thousandth(
    name: str, collective: Collective, num_bytes: float
) -> None:
    link = cluster(name).links[0]
    exact = (
        link.latency_s.value + collective.num_passes / 2 * num_bytes / link.bus_bytes_per_s.value
    )
    taken = float(law(name, collective).seconds(num_bytes, 2, 2))
    # Log-log interpolation of a + b x with step h errs by at most h^2 / 32, h = ln(2) / 4.
    assert taken == pytest.approx(exact, rel=0.001)


def test_p2p_by_hand() -> None:
    # A100: 228e9 B/s + 9 us in the node; 25e9 * .85 B/s + 24 us between nodes.
    taken = costs("a100-sxm-80").p2p_s([0, 228e6, 21.25e6, 0], [0, 0, 1, 1])
    np.testing.assert_allclose(taken, [0, 1.009e-3, 1.024e-3, 0])
