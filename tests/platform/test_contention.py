"""Streams that run at once: against the published measurements, and by the rule without them."""

import csv
from collections import defaultdict

import numpy as np
import pytest

from mist.plans.provenance import Kind
from mist.platform import OpCosts
from mist.platform.cluster import Contention
from tests.platform.samples import PUBLISHED, costs

OVERLAP = PUBLISHED / "overlap_l4.csv"
STREAMS = ("compute_n", "g2g_mib", "h2d_mib", "d2h_mib")


def measured(group: int) -> tuple[np.ndarray, np.ndarray]:
    """Times of each stream alone [rows, 4] and of all at once [rows], of the rows with several."""
    with OVERLAP.open() as file:
        rows = [{name: float(row[name]) for name in (*STREAMS, "latency_ms")}
                for row in csv.DictReader(file) if int(row["intra_group"]) == group]  # fmt: skip
    alone: dict[str, dict[float, float]] = defaultdict(lambda: {0.0: 0.0})
    for row in rows:
        running = [name for name in STREAMS if row[name]]
        if len(running) == 1:
            alone[running[0]][row[running[0]]] = row["latency_ms"]
    points = {name: sorted(found.items()) for name, found in alone.items()}
    several = [row for row in rows if sum(row[name] > 0 for name in STREAMS) > 1]
    by_itself = [
        [np.interp(row[name], *zip(*points[name], strict=True)) for name in STREAMS]
        for row in several
    ]
    return np.array(by_itself), np.array([row["latency_ms"] for row in several])


@pytest.mark.skipif(not OVERLAP.is_file(), reason=f"no {OVERLAP.name}: it does not ship")
@pytest.mark.parametrize(("group", "bar"), [(2, 0.03), (8, 0.03), (4, 0.02)])
def test_measured_streams(group: int, bar: float) -> None:
    """Groups of 4 were held out when the shares were fitted."""
    alone, together = measured(group)
    assert len(together) == 608
    predicted = costs("l4").together_s(*alone.T)
    assert np.mean(np.abs(predicted / together - 1)) < bar
    longest = np.mean(np.abs(alone.max(axis=1) / together - 1))
    assert longest > 0.3  # as if streams did not meet


def test_a_stream_alone_takes_its_time() -> None:
    for gpu in ("l4", "h100-sxm"):
        for stream in range(4):
            alone = [0.0] * 4
            alone[stream] = 2.0
            assert float(costs(gpu).together_s(*alone)) == 2.0


def test_streams_share_a_node_of_l4() -> None:
    """The shares of the profile: 0.99 + 0.20 in the first row; copies both ways take turns."""
    assert float(costs("l4").together_s(1.0, 1.0)) == pytest.approx(1.19)
    assert float(costs("l4").together_s(0.0, 0.0, 1.0, 1.0)) == pytest.approx(0.99 + 0.99)


@pytest.mark.parametrize(("compute", "collectives"), [(1.0, 0.4), (1.0, 3.0), (1.0, 1.05)])
def test_without_measurements_compute_slows_down(compute: float, collectives: float) -> None:
    law: OpCosts = costs("h100-sxm")
    gamma = law.runtime.overlap.compute_slowdown_ratio.value
    expected = max(compute + gamma * min(compute, collectives), collectives)
    assert float(law.together_s(compute, collectives)) == pytest.approx(expected)


def test_shares_are_not_negative() -> None:
    with pytest.raises(ValueError, match="from 0 up"):
        Contention(shares=((1.0, -0.1, 0.0, 0.0),), source="nowhere", kind=Kind.GUESS)
