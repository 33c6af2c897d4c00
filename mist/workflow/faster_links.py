"""The same job on a platform some of whose links are faster: what more bandwidth would bring."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from mist.platform.calibration import Profiles, figure_at, with_values
from mist.symbolic.job import Job, on_profiles

NIC: Final = ("cluster.network.nic_bytes_per_s",)
HOST: Final = ("device.host_to_device_bytes_per_s", "device.device_to_host_bytes_per_s")


def _scaled(profiles: Profiles, paths: tuple[str, ...], factor: float) -> Profiles:
    figures = {path: figure_at(profiles, path) for path in paths}
    faster = {path: replace(one, value=factor * one.value) for path, one in figures.items()}
    return with_values(profiles, faster)


def _faster_node(profiles: Profiles, factor: float) -> Profiles:
    """Links inside a node. Of measured tables all of the time shrinks, latencies too."""
    device, cluster, runtime = profiles
    direct = cluster.p2p_in_node
    rate = replace(direct.bytes_per_s, value=factor * direct.bytes_per_s.value)
    links = tuple(
        replace(
            link,
            bus_bytes_per_s=replace(
                link.bus_bytes_per_s, value=factor * link.bus_bytes_per_s.value
            ),
        )
        for link in cluster.links
    )
    tables = {
        name: replace(
            table, rows=tuple((size, *(us / factor for us in times)) for size, *times in table.rows)
        )
        for name, table in cluster.tables.items()
    }
    node = replace(cluster, p2p_in_node=replace(direct, bytes_per_s=rate), links=links)
    return device, replace(node, tables=tables), runtime


_LINKS: Final[Mapping[str, Callable[[Profiles, float], Profiles]]] = MappingProxyType(
    {
        "inside a node": _faster_node,
        "between nodes": lambda profiles, factor: _scaled(profiles, NIC, factor),
        "to host memory": lambda profiles, factor: _scaled(profiles, HOST, factor),
    }
)


def faster_jobs(job: Job, factor: float) -> dict[str, Job]:
    """The job with the links of each kind that it has `factor` times as fast, by their name."""
    platform = job.platform
    absent = {
        "inside a node": platform.gpus_per_node == 1,
        "between nodes": platform.num_nodes == 1,
    }
    jobs = {}
    for name, change in _LINKS.items():
        if not absent.get(name):
            jobs[name] = on_profiles(job, change(platform.profiles, factor))
    return jobs
