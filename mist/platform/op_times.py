"""What an operation costs on a platform, in seconds: one law per kind of operation.

Laws, with every constant from the device's, cluster's or runtime's profile:

    matrix product   t = c [t0 + ((F / (e peak))^p + (V / (b bw))^p)^(1/p)]
                     F = 2 batch m n k FLOP, V = element (m k + k n + m n) batch bytes
    flash forward    t = c [t0 + F (1 + s0 / seq_k) / (e peak)],
                     F = 4 batch heads seq_q seq_k head_dim FLOP, half of that with a causal mask;
                     without one s0 is a quarter as long
    flash backward   t = forward (2.85 + 430 / seq_k), seq_k at least 512
    memory-bound     t = bytes / (ratio bw) + kernels t0
    collectives      `collectives.py`
    transfers        t = latency + bytes / bandwidth
    streams at once  `together_s`

A measured table of the device, where it has one of the operation in the precision, takes the place
of the law of a matrix product or of attention: c times `TimeGrid.seconds`.
`op_sources.op_costs` lists which is used for what.

c is `tensor_time_scale`, the factor that calibration fits. The backward rule is from the
FlashAttention-3 paper's figures (3.7 at 512 tokens, 2.9 from 8k on), not the 2.5 of counted FLOPs.
All methods take numpy arrays (or numbers), broadcast them, and return float64 seconds.
"""

from dataclasses import dataclass, field
from functools import reduce

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mist.model.summary import Traffic
from mist.plans.numerics import Numerics
from mist.plans.workload import Precision
from mist.platform.cluster import Cluster, Collective
from mist.platform.collectives import CollectiveLaw
from mist.platform.device import AttentionLaw, Device, GemmLaw
from mist.platform.op_tables import Arrays, Law, OpTable, TabledOp, TimeGrid
from mist.platform.runtime import Runtime

F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpCosts:
    """Prices operations of one format on one device, cluster and runtime.

    Raises ValueError when the device has no law for its products.
    """

    device: Device
    cluster: Cluster
    runtime: Runtime
    numerics: Numerics
    _collectives: dict[Collective, CollectiveLaw] = field(init=False, repr=False, compare=False)
    _grids: dict[TabledOp, TimeGrid] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.device.gemm_law(self.numerics.products) is None:
            words = f"{self.device.name} has no law for products in {self.numerics.products}"
            raise ValueError(words)
        laws = {word: CollectiveLaw.of(self.cluster, word) for word in Collective}
        # Frozen: compiled laws are made once here, not with every price.
        object.__setattr__(self, "_collectives", laws)
        tables = {op: table for op in TabledOp if (table := self.table(op))}
        grids = {op: TimeGrid.of(op, table) for op, table in tables.items()}
        object.__setattr__(self, "_grids", grids)

    def table(self, op: TabledOp) -> OpTable | None:
        """The table that an operation is priced by, if there is one; none is of fp8."""
        is_product = op is TabledOp.GEMM
        number = self.numerics.products if is_product else self.numerics.compute
        tables = self.device.tables.get(op, {})
        return tables.get(number) if isinstance(number, Precision) else None

    def op_s(self, op: TabledOp, law: Law, *arguments: ArrayLike) -> F64:
        """Time of an operation by its table, else by its law of these arguments, in s."""
        sizes = _floats(*arguments)
        grid = self._grids.get(op)
        if grid is None:
            return law(sizes)
        result: F64 = self.device.tensor_time_scale.value * grid.seconds(sizes, law)
        return result

    def gemm_s(self, batch: ArrayLike, m: ArrayLike, n: ArrayLike, k: ArrayLike) -> F64:
        """Time of `batch` products (m, k) x (k, n), in s."""
        return self.op_s(TabledOp.GEMM, self._gemm_law_s, batch, m, n, k)

    def _gemm_law_s(self, arguments: Arrays) -> F64:
        law = self.gemm_law
        batch, m, n, k = arguments
        flop = 2.0 * batch * m * n * k
        num_bytes = self.numerics.product_bytes * batch * (m * k + k * n + m * n)
        compute = flop / (law.efficiency_ratio.value * law.peak_flop_per_s.value)
        memory = num_bytes / (law.bandwidth_scale.value * self.device.hbm_bytes_per_s.value)
        sharpness = law.exponent.value
        # A smooth maximum: near the crossing both limits slow a product down.
        bend = (compute**sharpness + memory**sharpness) ** (1.0 / sharpness)
        result: F64 = self.device.tensor_time_scale.value * (law.launch_s.value + bend)
        return result

    def attention_forward_s(  # noqa: PLR0913, PLR0917 (the dimensions of a traced op, in order)
        self,
        batch: ArrayLike,
        heads: ArrayLike,
        seq_q: ArrayLike,
        seq_k: ArrayLike,
        head_dim: ArrayLike,
        causal: ArrayLike,
    ) -> F64:
        """Time of the flash forward kernel, in s. `heads`: query heads; `causal`: 1 or 0.

        Between two head sizes of the profile the law's constants are interpolated; outside, the
        nearest holds.
        """
        op, law = TabledOp.ATTENTION_FORWARD, self._attention_forward_law_s
        return self.op_s(op, law, batch, heads, seq_q, seq_k, head_dim, causal)

    def _attention_forward_law_s(self, arguments: Arrays) -> F64:
        flash = self.device.flash_attention
        batch, heads, seq_q, seq_k, head_dim, causal = arguments
        efficiency, ramp, launch = _by_head_dim(flash.laws, head_dim)
        ramp = ramp * np.where(causal > 0, 1.0, flash.full_mask_ramp_ratio.value)
        flop = 4.0 * batch * heads * seq_q * seq_k * head_dim * np.where(causal > 0, 0.5, 1.0)
        slowdown = 1.0 + ramp / np.maximum(seq_k, 1.0)
        peak = self.device.gemm[self.numerics.compute].peak_flop_per_s.value
        core = flop * slowdown / (efficiency * peak)
        result: F64 = self.device.tensor_time_scale.value * (launch + core)
        return result

    def attention_backward_s(  # noqa: PLR0913, PLR0917 (as attention_forward_s)
        self,
        batch: ArrayLike,
        heads: ArrayLike,
        seq_q: ArrayLike,
        seq_k: ArrayLike,
        head_dim: ArrayLike,
        causal: ArrayLike,
    ) -> F64:
        """Time of the flash backward kernel, in s; arguments as in `attention_forward_s`.

        The law stretches the time of the forward kernel, by whatever that is priced.
        """
        op, law = TabledOp.ATTENTION_BACKWARD, self._attention_backward_law_s
        return self.op_s(op, law, batch, heads, seq_q, seq_k, head_dim, causal)

    def _attention_backward_law_s(self, arguments: Arrays) -> F64:
        flash = self.device.flash_attention
        tokens = np.maximum(arguments[3], flash.backward_min_tokens.value)
        ratio = flash.backward_ratio.value + flash.backward_ramp_tokens.value / tokens
        result: F64 = ratio * self.attention_forward_s(*arguments)
        return result

    def memory_s(self, traffic_bytes: ArrayLike, num_kernels: ArrayLike, traffic: Traffic) -> F64:
        """Time of memory-bound kernels that move `traffic_bytes` in all, in s."""
        num_bytes, kernels = _floats(traffic_bytes, num_kernels)
        result: F64 = (
            num_bytes / self.effective_hbm_bytes_per_s(traffic)
            + kernels * self.device.kernel_launch_s.value
        )
        return result

    def effective_hbm_bytes_per_s(self, traffic: Traffic) -> float:
        """HBM bandwidth that a class of operation reaches, in bytes/s."""
        return self.device.bandwidth_ratio.of(traffic) * self.device.hbm_bytes_per_s.value

    def all_gather_s(
        self, total_bytes: ArrayLike, group: ArrayLike, group_per_node: ArrayLike
    ) -> F64:
        """Time of an all-gather whose result has `total_bytes`, in s.

        `group`: ranks; `group_per_node`: how many of them share a node. 1 rank or 0 bytes: 0 s.
        """
        return self.collective_s(Collective.ALL_GATHER, total_bytes, group, group_per_node)

    def reduce_scatter_s(
        self, total_bytes: ArrayLike, group: ArrayLike, group_per_node: ArrayLike
    ) -> F64:
        """Time of a reduce-scatter whose input has `total_bytes`, in s; see `all_gather_s`."""
        return self.collective_s(Collective.REDUCE_SCATTER, total_bytes, group, group_per_node)

    def all_reduce_s(
        self, total_bytes: ArrayLike, group: ArrayLike, group_per_node: ArrayLike
    ) -> F64:
        """Time of an all-reduce of `total_bytes`, in s; see `all_gather_s`."""
        return self.collective_s(Collective.ALL_REDUCE, total_bytes, group, group_per_node)

    def collective_s(
        self,
        collective: Collective,
        total_bytes: ArrayLike,
        group: ArrayLike,
        group_per_node: ArrayLike,
    ) -> F64:
        """Time of any of the three, in s; see `all_gather_s`."""
        return self._collectives[collective].seconds(total_bytes, group, group_per_node)

    def p2p_s(self, num_bytes: ArrayLike, crosses_node: ArrayLike) -> F64:
        """Time of one transfer between two devices, in s; `crosses_node`: 1 or 0. 0 bytes: 0 s."""
        sent, crosses = _floats(num_bytes, crosses_node)
        link, network = self.cluster.p2p_in_node, self.cluster.network
        inside = link.latency_s.value + sent / link.bytes_per_s.value
        rate = network.nic_bytes_per_s.value * network.efficiency_ratio.value
        outside = network.p2p_latency_s.value + sent / rate
        return np.where(sent > 0, np.where(crosses > 0, outside, inside), 0.0)

    def together_s(
        self,
        compute_s: ArrayLike,
        collectives_s: ArrayLike,
        to_device_s: ArrayLike = 0.0,
        to_host_s: ArrayLike = 0.0,
    ) -> F64:
        """Time of streams that run at once, from what each takes by itself, in s.

        Measured contention where the cluster has it: the longest of its rows, none shorter than the
        longest stream. Else compute takes (1 + gamma) times as long while collectives run,
        max(C + gamma min(C, M), M), and copies are free.
        """
        streams = _floats(compute_s, collectives_s, to_device_s, to_host_s)
        longest = reduce(np.maximum, streams)
        # Without measurements copies are free, and only collectives slow compute down.
        contention = self.cluster.contention
        if contention is None:
            compute, collectives = streams[:2]
            gamma = self.runtime.overlap.compute_slowdown_ratio.value
            slowed = compute + gamma * np.minimum(compute, collectives)
            return np.maximum(slowed, longest)
        rows = (
            sum(share * stream for share, stream in zip(row, streams, strict=True))
            for row in contention.shares
        )
        result: F64 = np.where(
            # Rows were fitted to streams at once: a stream alone takes its own time.
            sum((stream > 0).astype(int) for stream in streams) > 1,
            reduce(np.maximum, rows, longest),
            longest,
        )
        return result

    def host_to_device_s(self, num_bytes: ArrayLike) -> F64:
        """Time of a copy from pinned host memory to the device, in s."""
        (copied,) = _floats(num_bytes)
        return copied / self.device.host_to_device_bytes_per_s.value

    def device_to_host_s(self, num_bytes: ArrayLike) -> F64:
        """Time of a copy from the device to pinned host memory, in s."""
        (copied,) = _floats(num_bytes)
        return copied / self.device.device_to_host_bytes_per_s.value

    @property
    def gemm_law(self) -> GemmLaw:
        """The law of matrix products."""
        law = self.device.gemm_law(self.numerics.products)
        assert law is not None  # refused when the costs were made
        return law


def _floats(*items: ArrayLike) -> tuple[F64, ...]:
    return tuple(np.asarray(item, dtype=np.float64) for item in items)


def _by_head_dim(laws: tuple[AttentionLaw, ...], head_dim: F64) -> tuple[F64, F64, F64]:
    """Efficiency ratio, half-rate tokens and launch seconds at each head size."""
    sizes = [law.head_dim for law in laws]
    efficiency, ramp, launch = (
        np.interp(head_dim, sizes, [getattr(law, name).value for law in laws])
        for name in ("efficiency_ratio", "half_rate_tokens", "launch_s")
    )
    return efficiency, ramp, launch
