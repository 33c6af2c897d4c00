"""`mist profile`: this machine as a profile that plans can be made for."""

import os
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from mist.exec.profiling import (
    Readings,
    Request,
    leads,
    num_gpus,
    take_network_readings,
    take_readings,
)
from mist.exec.profiling.readings import Reading
from mist.platform import Cluster, Collective, Device, Kind, Quantity
from mist.platform.cluster import CollectiveTable, Contention, Network, PointToPoint
from mist.platform.machine import SCHEMA, Machine
from mist.symbolic.load_programs import Progress
from mist.units import MICROSECOND
from mist.workflow.measured_device import device_of, figure, quantity, spread

RUNTIME: Final = "torch"
NUM_TURNS: Final = 8  # small sizes say a hundredth of the bandwidth: each turn is that much nearer
BUSY_RATIO: Final = 0.1  # of the processors with other programs: from here on it is told


def profile(request: Request, name: str, progress: Progress) -> Machine | None:
    """Measure this machine, with every rank at work; under torchrun also the network of its nodes.

    None from ranks of torchrun other than the first. Raises InputError and RankFailed.
    """
    if not leads():
        take_network_readings(request)
        return None
    progress(f"measuring {request.num_ranks} ranks for about {request.seconds:.0f} s")
    readings = take_readings(request)
    others = readings.others_ratio
    if others > BUSY_RATIO:
        progress(
            f"other programs had {others:.0%} of the processors: measure again when it is quiet"
        )
    return machine_of(readings, request, name, take_network_readings(request))


def num_places(device: str) -> int:
    """Ranks that have a device of their own here: a power of two."""
    count = num_gpus() if device == "cuda" else len(os.sched_getaffinity(0))
    return 1 << (max(count, 1).bit_length() - 1)


def machine_of(
    readings: Readings, request: Request, name: str, network: Readings | None = None
) -> Machine:
    """The machine that readings are of; `network`: readings between nodes like it, if any."""
    device = device_of(readings, f"{request.device}-{name}", name, request.device)
    others = readings.others_ratio
    return Machine(
        schema=SCHEMA,
        what=f"{readings.about['name']}; {request.num_ranks} ranks at once, about "
        f"{request.seconds:.0f} s, other programs had {others:.0%} of the processors"
        f"{_driven(readings.about)}",
        runtime=RUNTIME,
        device=device,
        cluster=_cluster(readings, request, name, device.name, network),
        values=dict(_values(readings, device)),
    )


def _driven(about: Mapping[str, str | float]) -> str:
    """How a GPU was driven behind the products, as a part of a sentence."""
    units = {"sm_clock_mhz": "MHz", "power_w": "W", "temperature_c": "degrees C"}
    words = [f"{about[name]:g} {unit}" for name, unit in units.items() if name in about]
    return f"; under load {', '.join(words)}" if words else ""


def _cluster(
    readings: Readings, request: Request, name: str, device: str, between: Readings | None
) -> Cluster:
    sent = _transfer(readings)
    host = figure(float(readings.about["host_bytes"]), "what the system reports")
    counted = figure(request.num_ranks, "ranks that were measured at once")
    one = Quantity(value=1, source="one machine was measured", kind=Kind.SPEC)
    return Cluster(
        schema="mist.cluster/1",
        name=name,
        what=str(readings.about["name"]),
        devices=(device,),
        gpus_per_node=counted,
        max_nodes=one if between is None else None,
        host_memory_bytes=host,
        p2p_in_node=sent,
        network=_no_network(sent) if between is None else network_of(between),
        links=(),
        tables=_tables(readings) if request.num_ranks > 1 else {},
        contention=_contention(readings) if request.num_ranks > 1 else None,
    )


def _no_network(sent: PointToPoint) -> Network:
    return Network(
        nic_bytes_per_s=sent.bytes_per_s,
        efficiency_ratio=figure(1.0, "not used: one machine"),
        hop_s=sent.latency_s,
        p2p_latency_s=sent.latency_s,
    )


def network_of(readings: Readings) -> Network:
    """The law between nodes (`mist.platform.collectives`) through what was measured.

    seconds / passes = (n - 1) / n * bytes / (g * bytes_per_s) + n * hop

    n ranks, g of them on each node. Bandwidth is the median of the largest third of sizes, and
    latency of the smallest, each less what the other takes: a few slow readings decide nothing.
    """
    local = float(readings.about["ranks"])
    world = local * float(readings.about["nodes"])
    rows = [
        (word.num_passes, row) for word in Collective for row in readings.of(f"{word} over nodes")
    ]
    seconds = np.array([row.seconds / passes for passes, row in rows])
    moved = np.array([row.sizes["bytes"] for _, row in rows]) * (world - 1) / world / local
    small, large = moved <= np.quantile(moved, 1 / 3), moved >= np.quantile(moved, 2 / 3)
    hop_s = 0.0
    for _ in range(NUM_TURNS):
        slope = max(float(np.median((seconds - world * hop_s)[large] / moved[large])), 1e-15)
        hop_s = max(float(np.median((seconds - slope * moved)[small])) / world, 0.0)
    words = f"collectives over {world:.0f} ranks of {readings.about['nodes']:.0f} nodes"
    words += f"; {spread([row for _, row in rows])}"
    sent = min(row.seconds for row in readings.of("send to node"))
    return Network(
        nic_bytes_per_s=figure(1 / slope, words),
        efficiency_ratio=figure(1.0, "what was measured is what is reached"),
        hop_s=figure(hop_s, words),
        p2p_latency_s=figure(sent, "the shortest transfer between two nodes"),
    )


def _tables(readings: Readings) -> Mapping[Collective, CollectiveTable]:
    return {word: _table(list(readings.of(word))) for word in Collective}


def _table(rows: Sequence[Reading]) -> CollectiveTable:
    groups = sorted({int(row.sizes["group"]) for row in rows})
    sizes = sorted({row.sizes["bytes"] for row in rows})
    seconds = {(row.sizes["bytes"], int(row.sizes["group"])): row.seconds for row in rows}
    return CollectiveTable(
        columns=("bytes", *(f"group_{group}_us" for group in groups)),
        rows=tuple(
            (size, *(float(f"{seconds[size, group] / MICROSECOND:.4g}") for group in groups))
            for size in sizes
        ),
        source=f"mist profile: {spread(rows)}",
        kind=Kind.MEASURED,
    )


def _transfer(readings: Readings) -> PointToPoint:
    """latency + bytes / bandwidth through what was sent, by relative error; memory if alone."""
    rows = list(readings.of("send")) or list(readings.of("device_to_host"))
    timed = list(readings.of("send, there and back")) or rows
    num_bytes = np.array([row.sizes["bytes"] for row in rows])
    seconds = np.array([row.seconds for row in rows])
    columns = np.stack([np.ones_like(num_bytes), num_bytes], axis=1) / seconds[:, None]
    latency_s, slope = np.linalg.lstsq(columns, np.ones_like(seconds), rcond=None)[0]
    words = f"one transfer, {spread(timed)}"
    return PointToPoint(
        bytes_per_s=figure(1 / max(slope, 1e-15), words),
        latency_s=figure(max(latency_s, seconds.min() / 10), words),
    )


def _contention(readings: Readings) -> Contention:
    """What each stream takes of computation beside it: C + a M + b I + c O together."""
    taken = {
        name: next(readings.of(f"beside {name}"))
        for name in ("compute", "collective", "to_device", "to_host")
    }
    shares = [1.0]
    for name in ("collective", "to_device", "to_host"):
        both = next(readings.of(f"beside compute and {name}"))
        share = (both.seconds - taken["compute"].seconds) / taken[name].seconds
        shares.append(round(min(max(share, 0.0), 1.0), 2))
    return Contention(
        shares=((shares[0], shares[1], shares[2], shares[3]),),
        source=f"mist profile: products beside each, {spread(list(taken.values()))}",
        kind=Kind.MEASURED,
    )


def _values(readings: Readings, device: Device) -> Mapping[str, Quantity]:
    """Figures of the runtime that depend on the machine."""
    row = next(readings.of("optimizer"))
    rate = device.bandwidth_ratio.pointwise.value * device.hbm_bytes_per_s.value
    per_param = rate * row.seconds / row.sizes["params"]
    values = {
        "traffic.optimizer_sharded_bytes_per_param": quantity(
            row, per_param, "AdamW and the norm, at the bandwidth of pointwise operations"
        ),
        "host.layer_launch_s": _noted(readings, "host layer", "what FSDP2 adds to a layer"),
        "host.micro_batch_launch_s": _noted(readings, "host micro-batch", "beside its layers"),
        "host.launch_ahead_ratio": _ahead(readings, "product"),
    }
    if next(readings.of("host tensor layer"), None) is not None:
        values |= {
            "host.tensor_parallel_launch_s": _noted(
                readings, "host tensor layer", "what tensor parallelism adds to it", "tp"
            ),
            "overlap.zero_all_gather_ratio": _ahead(readings, "all_gather"),
            "overlap.zero_reduce_scatter_ratio": _ahead(readings, "reduce_scatter"),
            "overlap.gradient_all_reduce_ratio": _ahead(readings, "all_reduce"),
        }
    return {f"runtime.{name}": value for name, value in values.items()}


def _noted(readings: Readings, op: str, words: str, axis: str = "dp") -> Quantity:
    timed = [*readings.of(f"tiny {axis}"), *readings.of("tiny plain")]
    return figure(next(readings.of(op)).seconds, f"{words}, of a tiny model; {spread(timed)}")


def _ahead(readings: Readings, what: str) -> Quantity:
    waits = min(next(readings.of(f"{what} waits")).seconds, 1.0)
    return figure(1.0 - waits, f"share of the time of a {what} that is left when its call returns")
