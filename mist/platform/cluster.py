"""A cluster: what joins the devices of a node, and the nodes. Mirrors `profiles/clusters/*.yaml`.

Collective sizes follow the convention of nccl-tests: bytes of the full buffer (the output of an
all-gather, the input of a reduce-scatter or an all-reduce).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, Literal

from mist.plans.provenance import Kind
from mist.plans.workload import MOST_GPUS
from mist.platform.quantity import Quantity, Record


class Collective(StrEnum):
    """The collectives that are priced."""

    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_REDUCE = "all_reduce"

    @property
    def num_passes(self) -> int:
        """Times that the buffer crosses each link: an all-reduce is a scatter and a gather."""
        return 2 if self is Collective.ALL_REDUCE else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveTable(Record):
    """Measured times of one collective: a row per size, a column per group size.

    `columns` is ["bytes", "group_2_us", "group_4_us", ...]. Raises ValueError when a column or a
    row breaks that form, or when sizes or times are not positive.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[float, ...], ...]
    source: str
    kind: Kind

    def __post_init__(self) -> None:
        if self.columns[:1] != ("bytes",) or len(self.columns) < 2:
            raise ValueError('columns must be "bytes" and then "group_2_us", "group_4_us", ...')
        if len(self.rows) < 2 or any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"rows must be two or more, of {len(self.columns)} numbers each")
        if any(number <= 0 for row in self.rows for number in row):
            raise ValueError("sizes and times must be positive")
        for ascending in (self.groups, tuple(row[0] for row in self.rows)):
            if list(ascending) != sorted(set(ascending)):
                raise ValueError(f"groups and sizes must rise, found {list(ascending)}")

    @property
    def groups(self) -> tuple[int, ...]:
        """Group sizes of the columns after the first."""
        matches = [re.fullmatch(r"group_(\d+)_us", column) for column in self.columns[1:]]
        if not all(matches):
            raise ValueError('columns must be "bytes" and then "group_2_us", "group_4_us", ...')
        return tuple(int(match[1]) for match in matches if match)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link(Record):
    """One group size without a table: latency + passes * (n - 1) / n * bytes / bandwidth."""

    not_zero: ClassVar = ("bus_bytes_per_s",)
    group: int
    bus_bytes_per_s: Quantity
    latency_s: Quantity

    def __post_init__(self) -> None:
        Record.__post_init__(self)
        if self.group < 2:
            raise ValueError(f"group {self.group} is not at least 2 ranks")


@dataclass(frozen=True, slots=True, kw_only=True)
class PointToPoint(Record):
    """One transfer between two devices: latency + bytes / bandwidth."""

    not_zero: ClassVar = ("bytes_per_s",)
    bytes_per_s: Quantity
    latency_s: Quantity


@dataclass(frozen=True, slots=True, kw_only=True)
class Network(Record):
    """Between nodes: each device's share of the NICs in one direction, and what is reached of it.

    `hop_s` is paid once per rank of a collective that leaves the node (twice for an all-reduce).
    """

    not_zero: ClassVar = ("nic_bytes_per_s", "efficiency_ratio")
    nic_bytes_per_s: Quantity
    efficiency_ratio: Quantity
    hop_s: Quantity
    p2p_latency_s: Quantity


@dataclass(frozen=True, slots=True, kw_only=True)
class Contention(Record):
    """How streams slow each other down: compute, collectives, copies to and from the device.

    Each row of `shares` is one way in which they share a node, w: streams that take X_i by
    themselves take sum of w_i X_i there, and together the longest of the rows. Raises ValueError
    for anything but rows of four numbers from 0 up.
    """

    shares: tuple[tuple[float, float, float, float], ...]
    source: str
    kind: Kind

    def __post_init__(self) -> None:
        if not self.shares or any(share < 0 for row in self.shares for share in row):
            raise ValueError("shares must be rows of four numbers from 0 up")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster(Record):
    """Nodes of equal devices. `devices`: the names it may hold, the default first.

    Group sizes of a node's collectives come from `tables` (measured) and `links` (two-number laws);
    together they must reach from 2 to `gpus_per_node`. `max_nodes` is null where nothing limits it.
    `host_memory_bytes`: of one node; `host_memory_by_device`: where nodes of a device have another.
    `contention` is measured; without it the runtime's slowdown of compute stands in.
    `price_per_gpu_hour_usd`: what one GPU costs to rent; without it `--price` says so.
    """

    not_zero: ClassVar = ("host_memory_bytes",)
    schema: Literal["mist.cluster/1"]
    name: str
    what: str
    devices: tuple[str, ...]
    gpus_per_node: Quantity
    max_nodes: Quantity | None
    host_memory_bytes: Quantity
    p2p_in_node: PointToPoint
    network: Network
    links: tuple[Link, ...]
    tables: Mapping[Collective, CollectiveTable]
    contention: Contention | None = None
    price_per_gpu_hour_usd: Quantity | None = None
    host_memory_by_device: Mapping[str, Quantity] = field(default_factory=dict)

    def __post_init__(self) -> None:
        Record.__post_init__(self)
        if not self.devices:
            raise ValueError("devices is empty: name at least one")
        for count in (self.gpus_per_node, self.max_nodes):
            if count is not None and (count.value % 1 or not 1 <= count.value <= MOST_GPUS):
                raise ValueError(
                    f"gpus_per_node and max_nodes must be whole numbers from 1 to {MOST_GPUS}, "
                    f"found {count.value}"
                )
        self._check_price()
        self._check_host_memory()
        for collective in Collective:
            # Group sizes between those given are interpolated, those outside are not: they must
            # span the node.
            groups = self.groups(collective)
            if self.num_gpus_per_node > 1 and (
                groups[:1] != (2,) or groups[-1] < self.num_gpus_per_node
            ):
                raise ValueError(
                    f"{collective} has group sizes {list(groups)} in links and tables; "
                    f"it needs 2 to {self.num_gpus_per_node}"
                )

    def _check_price(self) -> None:
        price = self.price_per_gpu_hour_usd
        if price is not None and price.value == 0:
            raise ValueError("price_per_gpu_hour_usd is 0: leave out a price that is not known")

    def _check_host_memory(self) -> None:
        strangers = sorted(set(self.host_memory_by_device) - set(self.devices))
        if strangers:
            raise ValueError(f"host_memory_by_device names {strangers}, which are not in devices")

    @property
    def num_gpus_per_node(self) -> int:
        """Devices of a node."""
        return int(self.gpus_per_node.value)

    @property
    def num_nodes_limit(self) -> int | None:
        """Nodes at most, None without a limit."""
        return None if self.max_nodes is None else int(self.max_nodes.value)

    def host_memory_of(self, device: str) -> Quantity:
        """Bytes of host memory of one node with this device."""
        return self.host_memory_by_device.get(device, self.host_memory_bytes)

    def groups(self, collective: Collective) -> tuple[int, ...]:
        """Group sizes for which the node's collective has a table column or a link, rising.

        Raises ValueError when a group size is given twice.
        """
        table = self.tables.get(collective)
        groups = sorted([link.group for link in self.links] + list(table.groups if table else ()))
        if len(groups) != len(set(groups)):
            raise ValueError(f"{collective} has a group size twice in links and tables: {groups}")
        return tuple(groups)
