"""The law between nodes, fitted to what ranks of several nodes measured."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mist.exec.profiling import Readings, leads, local_ranks, take_network_readings
from mist.exec.profiling.readings import Reading, Request
from mist.platform import Collective
from mist.platform.collectives import CollectiveLaw
from mist.platform.profiles import load_cluster
from mist.workflow.machine_profile import network_of

ROOT = Path(__file__).parents[2]
BYTES = [4.0**power * 1024 for power in range(2, 10)]


def reading(op: str, num_bytes: float, seconds: float) -> Reading:
    return Reading(
        op=op,
        sizes={"bytes": num_bytes},
        seconds=seconds,
        spread_ratio=0.0,
        others_ratio=0.0,
        count=5,
    )


@pytest.mark.parametrize(("ranks", "nodes"), [(1, 2), (1, 8), (4, 3)])
def test_the_law_of_a_cluster_is_found_again(ranks: int, nodes: int) -> None:
    # One GPU a machine has no times in a node, so the law between nodes is all there is.
    cluster = load_cluster("one-gpu").profile
    rows = [
        reading(f"{word} over nodes", num_bytes, float(seconds))
        for word in Collective
        for num_bytes, seconds in zip(
            BYTES,
            CollectiveLaw.of(cluster, word).seconds(np.array(BYTES), ranks * nodes, ranks),
            strict=True,
        )
    ]
    rows += [reading("send to node", num_bytes, 1e-4 + num_bytes / 1e9) for num_bytes in BYTES]
    found = network_of(Readings(about={"nodes": nodes, "ranks": ranks}, rows=tuple(rows)))
    known = cluster.network
    rate = known.nic_bytes_per_s.value * known.efficiency_ratio.value
    assert found.nic_bytes_per_s.value * found.efficiency_ratio.value == pytest.approx(rate, 1e-3)
    assert found.hop_s.value == pytest.approx(known.hop_s.value, rel=1e-3)
    assert found.p2p_latency_s.value == pytest.approx(1e-4 + BYTES[0] / 1e9, rel=1e-3)


def test_one_slow_reading_decides_nothing() -> None:
    rows = [
        reading(f"{word} over nodes", num_bytes, word.num_passes * (2e-4 + num_bytes / 2 / 1e9))
        for word in Collective
        for num_bytes in BYTES
    ]
    rows.append(reading("send to node", BYTES[0], 1e-4))
    late = [replace(row, seconds=(50 if i in (0, 7) else 1) * row.seconds)
            for i, row in enumerate(rows)]  # fmt: skip
    found = network_of(Readings(about={"nodes": 2, "ranks": 1}, rows=tuple(late)))
    assert found.nic_bytes_per_s.value == pytest.approx(1e9, rel=1e-3)
    assert found.hop_s.value == pytest.approx(1e-4, rel=1e-3)


def test_one_node_has_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(device="cpu", num_ranks=2, seconds=1)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (take_network_readings(request), local_ranks(), leads()) == (None, None, True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert (take_network_readings(request), local_ranks(), leads()) == (None, 2, False)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


PROFILE = """
import sys
from mist.exec.profiling import Request, take_network_readings
readings = take_network_readings(Request(device="cpu", num_ranks=1, seconds=1))
print(readings.dump())
"""


@pytest.mark.slow  # two processes that load torch
def test_two_ranks_that_pose_as_two_nodes() -> None:
    environment = {
        **os.environ, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROFILE],
            env={**environment, "RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    texts = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    readings = Readings.parse(texts[0])
    assert json.loads(texts[0])["about"] == {"nodes": 2, "ranks": 1}
    network = network_of(readings)
    # 8 MiB and more pass in 1 ms to 10 s, and no hop takes longer than that.
    assert 1e6 < network.nic_bytes_per_s.value < 1e12
    assert 0 <= network.hop_s.value < 10
    assert 0 < network.p2p_latency_s.value < 10
