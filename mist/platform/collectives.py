"""Time of a collective, from measured points in a node and a bandwidth law between nodes.

Notation: n ranks, g of them on each node, V bytes of the full buffer (nccl-tests' convention),
c = 1 pass for an all-gather or reduce-scatter, 2 for an all-reduce, f = c (n - 1) / n.

    in a node     T(V, n) = log-log interpolation of the points in V and in n
    across nodes  T = max( T(V, g),  f V / (g nic eta) + c n hop )

In V: below the smallest point the time is constant (latency), above the largest it grows in
proportion to V (the last bandwidth). In n: a group size between two of the table (3, 5, 6, 7) has
the log-interpolated time. Measured points are kept as they are: up to 1 MiB their noise can make a
larger buffer look up to a third faster, and switches make 8 ranks faster than 4 at some sizes.
Points held out (every third size of four systems) are met within 2.5 to 3.6 % (median); a straight
line alpha + V / beta misses them by 11 %. Source: tables of NVIDIA aiconfigurator 0.12.0.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mist.platform.cluster import Cluster, Collective, CollectiveTable, Link, Network
from mist.units import MICROSECOND

F64 = NDArray[np.float64]

# Where a link law is sampled when no table sets the sizes: 512 B to 16 GiB, four per octave, which
# keeps the interpolated law within 0.1 % of the exact one.
_LINK_BYTES: F64 = 2.0 ** np.arange(9, 34.25, 0.25)


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveLaw:
    """One collective of a cluster: its times in a node, its passes, and the network beyond."""

    in_node: "NodeTimes"
    num_passes: int
    network: Network

    @classmethod
    def of(cls, cluster: Cluster, collective: Collective) -> "CollectiveLaw":
        """The law of a cluster's collective."""
        return cls(
            in_node=NodeTimes.of(cluster, collective),
            num_passes=collective.num_passes,
            network=cluster.network,
        )

    def seconds(self, total_bytes: ArrayLike, group: ArrayLike, group_per_node: ArrayLike) -> F64:
        """Time in s over `group` ranks, `group_per_node` of them on each node.

        `total_bytes`: bytes of the full buffer. Arrays broadcast; 0 bytes or 1 rank take 0 s.
        """
        num_bytes, ranks, ranks_per_node = (
            np.asarray(item, dtype=np.float64) for item in (total_bytes, group, group_per_node)
        )
        ranks_per_node = np.minimum(ranks_per_node, ranks)
        inside = np.zeros(())
        if self.in_node.log_groups.size:
            in_node_s = self.in_node.seconds(
                # Where nothing moves the logarithm still needs a size; that entry is masked below.
                np.maximum(num_bytes, 1.0),
                np.maximum(ranks_per_node, 2.0),
            )
            inside = np.where(ranks_per_node > 1, in_node_s, 0.0)
        total = np.where(
            ranks > ranks_per_node,
            np.maximum(inside, self._across_nodes_s(num_bytes, ranks, ranks_per_node)),
            inside,
        )
        return np.where((num_bytes > 0) & (ranks > 1), total, 0.0)

    def _across_nodes_s(self, num_bytes: F64, ranks: F64, ranks_per_node: F64) -> F64:
        nic = self.network.nic_bytes_per_s.value * self.network.efficiency_ratio.value
        transfer = (ranks - 1.0) / ranks * num_bytes / (ranks_per_node * nic)
        result: F64 = self.num_passes * (transfer + ranks * self.network.hop_s.value)
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeTimes:
    """One collective in a node, on a grid: log_seconds[N, K] over log_groups[N], log_bytes[K]."""

    log_bytes: F64
    log_groups: F64
    log_seconds: F64

    @classmethod
    def of(cls, cluster: Cluster, collective: Collective) -> "NodeTimes":
        """The grid of a cluster's table and links. Empty (N = 0) for one device per node."""
        table = cluster.tables.get(collective)
        num_bytes = _grid_bytes(table, has_links=bool(cluster.links))
        rows = {link.group: _link_s(link, collective, num_bytes) for link in cluster.links}
        if table is not None:
            rows |= _table_s(table, num_bytes)
        groups = sorted(rows)
        return cls(
            log_bytes=np.log(num_bytes),
            log_groups=np.log(np.asarray(groups, dtype=np.float64)),
            log_seconds=np.log(np.asarray([rows[group] for group in groups])),
        )

    def seconds(self, num_bytes: F64, group: F64) -> F64:
        """Time in s of `num_bytes` (> 0) among `group` ranks (>= 2); arrays broadcast."""
        log_bytes = np.log(num_bytes)
        # np.interp over the indices gives each size a fractional index: its whole part is the cell,
        # its rest the place in it. Sizes outside get the index of the edge.
        size = np.interp(log_bytes, self.log_bytes, np.arange(self.log_bytes.size, dtype=float))
        rank = np.interp(
            np.log(group), self.log_groups, np.arange(self.log_groups.size, dtype=float)
        )
        # The last point belongs to the last cell, which keeps low + 1 within the grid.
        low_size = np.minimum(size.astype(np.intp), self.log_bytes.size - 2)
        low_rank = np.minimum(rank.astype(np.intp), max(self.log_groups.size - 2, 0))
        high_rank = np.minimum(low_rank + 1, self.log_groups.size - 1)
        toward_size, toward_rank = size - low_size, rank - low_rank
        low = self._at(low_rank, low_size, toward_size)
        high = self._at(high_rank, low_size, toward_size)
        # In logarithms a sum: above the largest size time grows with the bytes.
        beyond = np.maximum(log_bytes - self.log_bytes[-1], 0.0)
        result: F64 = np.exp(low + (high - low) * toward_rank + beyond)
        return result

    def _at(self, rank: NDArray[np.intp], size: NDArray[np.intp], toward: F64) -> F64:
        # One flat index: rank and size broadcast before anything is gathered.
        flat, width = self.log_seconds.ravel(), self.log_bytes.size
        low = flat[rank * width + size]
        result: F64 = low + (flat[rank * width + size + 1] - low) * toward
        return result


def _grid_bytes(table: CollectiveTable | None, *, has_links: bool) -> F64:
    measured = np.asarray([row[0] for row in table.rows] if table else [], dtype=np.float64)
    # Measured sizes stay grid points, so that interpolation meets them exactly.
    return np.union1d(measured, _LINK_BYTES) if has_links or table is None else measured


def _table_s(table: CollectiveTable, num_bytes: F64) -> dict[int, F64]:
    """Columns of the table on the grid; its sizes are grid points, so they stay exact."""
    points = np.asarray(table.rows, dtype=np.float64)
    beyond = np.maximum(num_bytes / points[-1, 0], 1.0)
    return {
        group: beyond
        * MICROSECOND
        * np.exp(np.interp(np.log(num_bytes), np.log(points[:, 0]), np.log(points[:, column])))
        for column, group in enumerate(table.groups, start=1)
    }


def _link_s(link: Link, collective: Collective, num_bytes: F64) -> F64:
    factor = collective.num_passes * (link.group - 1) / link.group
    result: F64 = link.latency_s.value + factor * num_bytes / link.bus_bytes_per_s.value
    return result
