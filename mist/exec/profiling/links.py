"""Transfers between ranks, and how they slow down computation at the same time."""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
import torch.distributed as dist

from mist.exec.profiling.clock import Call, Clock

Start = Callable[[torch.Tensor, torch.Tensor, Any, bool], Any]


def _all_gather(whole: torch.Tensor, part: torch.Tensor, group: Any, later: bool) -> Any:  # noqa: ANN401 (as torch.distributed)
    return dist.all_gather_into_tensor(whole, part, group=group, async_op=later)


def _reduce_scatter(whole: torch.Tensor, part: torch.Tensor, group: Any, later: bool) -> Any:  # noqa: ANN401
    return dist.reduce_scatter_tensor(part, whole, group=group, async_op=later)


def _all_reduce(whole: torch.Tensor, part: torch.Tensor, group: Any, later: bool) -> Any:  # noqa: ANN401
    return dist.all_reduce(whole, group=group, async_op=later)


COLLECTIVES: Final[dict[str, Start]] = {
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_reduce": _all_reduce,
}


def read_collectives(clock: Clock) -> None:
    """Every collective at every size in groups of 2, 4, ... ranks, all groups at once.

    Each stands between products, as in training: with its buffers out of the caches, and ranks
    that come to it at different times.
    """
    work = _products(clock, clock.sizes.between_s)
    size = 2
    while size <= dist.get_world_size():
        group, _ = dist.new_subgroups(size)
        for name, start in COLLECTIVES.items():
            for num_bytes in clock.sizes.collective_bytes:
                call = into_fresh(start, *buffers(clock.device, num_bytes, size), group)
                clock.read_amid(name, {"bytes": num_bytes, "group": size}, call, work)
        size *= 2


def into_fresh(start: Start, whole: torch.Tensor, part: torch.Tensor, group: Any) -> Call:  # noqa: ANN401
    """A collective whose result is allocated for it."""
    if start is _all_gather:
        return lambda: start(torch.empty_like(whole), part, group, False)
    return lambda: start(whole, torch.empty_like(part), group, False)


def _products(clock: Clock, seconds: float) -> Call:
    """Products that take about this long."""
    width = clock.sizes.beside_width
    x_NN = torch.randn(width, width, device=clock.device)
    times = max(round(seconds / clock.read("beside product", {}, lambda: x_NN @ x_NN)), 1)

    def compute() -> None:
        for _ in range(times):
            x_NN @ x_NN

    return compute


def buffers(device: torch.device, num_bytes: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole of a collective among `size` ranks, and each rank's part, in fp32."""
    whole = torch.zeros(num_bytes // 4, device=device)
    return whole, torch.zeros(whole.numel() // size, device=device)


def read_transfers(clock: Clock) -> None:
    """Neighbours: 0 and 1, 2 and 3, ..."""
    rank = dist.get_rank()
    there_and_back(clock, "send", rank ^ 1, leads=rank % 2 == 0)


def there_and_back(clock: Clock, op: str, peer: int | None, *, leads: bool) -> None:
    """One rank sends and its peer receives, and back again; without a peer a rank looks on."""
    for num_bytes in clock.sizes.sent_bytes:
        tensor = torch.zeros(num_bytes // 4, device=clock.device)

        def both_ways() -> None:
            first, second = (dist.isend, dist.irecv) if leads else (dist.irecv, dist.isend)
            for way in (first, second) if peer is not None else ():
                for work in dist.batch_isend_irecv([dist.P2POp(way, tensor, peer)]):  # noqa: B023
                    work.wait()

        seconds = clock.read(f"{op}, there and back", {"bytes": num_bytes}, both_ways)
        clock.note(op, {"bytes": num_bytes}, seconds / 2)


def read_beside(clock: Clock) -> None:
    """Computation, a collective and copies: each alone, and each at once with computation."""
    whole, part = buffers(clock.device, clock.sizes.beside_bytes, dist.get_world_size())
    on_host = torch.zeros(whole.shape, pin_memory=clock.device.type == "cuda")
    group = dist.group.WORLD
    collective_s = clock.read(
        "beside collective", {}, lambda: _all_gather(whole, part, group, False)
    )
    compute = _products(clock, collective_s)

    def with_collective() -> None:
        work = _all_gather(whole, part, group, True)
        compute()
        work.wait()

    clock.read("beside compute", {}, compute)
    clock.read("beside compute and collective", {}, with_collective)
    for name, target, source in (("to_device", whole, on_host), ("to_host", on_host, whole)):
        copy = _copier(clock.device, target, source)
        clock.read(f"beside {name}", {}, copy)

        def with_copy() -> None:
            copy()  # noqa: B023
            compute()

        clock.read(f"beside compute and {name}", {}, with_copy)


def _copier(device: torch.device, target: torch.Tensor, source: torch.Tensor) -> Call:
    """A copy that overlaps with what follows, where the device can."""
    if device.type != "cuda":
        return lambda: target.copy_(source)
    # Copies on the computing stream would wait for the products.
    stream = torch.cuda.Stream(device)

    def copy() -> None:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    return copy


def read_waiting(clock: Clock) -> None:
    """How soon each collective returns, against when it is done: till then nothing overlaps.

    FSDP2 issues its collectives this way, on a stream of their own where there are streams.
    """
    whole, part = buffers(clock.device, clock.sizes.beside_bytes, dist.get_world_size())
    for name, start in COLLECTIVES.items():
        call = partial(start, whole, part, dist.group.WORLD, False)
        clock.note(f"{name} waits", {}, clock.waits_ratio(call))
