"""What one step of this rank really did: the peak of live bytes, and the collectives.

Every operation passes through a dispatch mode. Live bytes are those of tensor storages: counted
when an operation makes one, no longer when it is freed or FSDP2 resizes it to nothing. On CUDA the
allocator's own peaks are exact and cost nothing, and a step whose operations are counted is bound
by the host: memory and collectives are of different steps there. A collective is counted once, with
the bytes of the whole buffer (gathered, or before scattering).
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _resolve_process_group
from torch._ops import OpOverload
from torch.distributed.distributed_c10d import GroupName
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mist.exec.observation import CollectiveTotal
from mist.plans.host_memory import pinned_bytes

# The same collective has several names: c10d's own, and those of functional collectives.
KINDS: Final = {
    "_allgather_base_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "alltoall_base_": "all_to_all",
    "all_to_all_single": "all_to_all",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "receive",
}
NAMESPACES: Final = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMeasurement:
    """One step of one rank. `peak_bytes`: of the device, states included.

    On CUDA the bytes of blocks in use, those included that are freed but that a stream still reads;
    `allocated_bytes`: of tensors alone. `reserved_bytes`: what the allocator had of the device.
    `num_alloc_retries`: how often it gave memory back and tried again. `collectives`: none where
    nothing counted them.
    """

    peak_bytes: int
    collectives: tuple[CollectiveTotal, ...] = ()
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    num_alloc_retries: int | None = None


def allocated(stats: Mapping[str, int]) -> StepMeasurement:
    """What CUDA's caching allocator says of a step (`torch.cuda.memory_stats`)."""
    return StepMeasurement(
        peak_bytes=stats["active_bytes.all.peak"],
        allocated_bytes=stats["allocated_bytes.all.peak"],
        reserved_bytes=stats["reserved_bytes.all.peak"],
        num_alloc_retries=stats["num_alloc_retries"],
    )


Rows = Mapping[tuple[str, str], tuple[int, int]]


def collectives_of(rows: Rows) -> tuple[CollectiveTotal, ...]:
    """Rows of (axis, kind): (count, bytes) in order."""
    return tuple(
        CollectiveTotal(axis=axis, kind=kind, count=count, bytes=size)
        for (axis, kind), (count, size) in sorted(rows.items())
    )


class StepRecorder(TorchDispatchMode):
    """Counts within `with`; `axes`: names of process groups, and the axis that each stands for."""

    def __init__(self, states: Iterable[torch.Tensor], axes: Mapping[str, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._axes = axes
        self._live: dict[int, int] = {}
        self._bytes = self._peak = 0
        self._hosted: dict[int, int] = {}
        self._host_bytes = self._host_peak = 0
        self._hosting = False
        self._pins = False
        self._rows: dict[tuple[str, str], list[int]] = {}
        for tensor in states:
            self._count(tensor.untyped_storage())

    def measured(self) -> StepMeasurement:
        """What was counted."""
        return StepMeasurement(peak_bytes=self._peak, collectives=collectives_of(self.rows()))

    def rows(self) -> Rows:
        """Collectives so far: (axis, kind) to (count, bytes)."""
        return {key: (count, size) for key, (count, size) in self._rows.items()}

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Within: new storages are in host memory."""
        with patch.object(self, "_hosting", True):
            yield

    def __enter__(self) -> "StepRecorder":
        self._resize: Callable[..., Any] = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> object:
            result = self._resize(storage, size)
            self._count(storage)
            return result

        # FSDP2 frees gathered parameters by resizing their storages, which no dispatch mode sees.
        setattr(torch.UntypedStorage, "resize_", resize)  # noqa: B010 (mypy: a method)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        setattr(torch.UntypedStorage, "resize_", self._resize)  # noqa: B010
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,  # noqa: ANN401 (torch's own signature)
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        # A DTensor runs the same operation on its local tensor, which comes by here again.
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        if func.namespace in NAMESPACES:
            self._note(func, args, result)
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view:  # the storage of a view is known, or not ours
            for tensor in _tensors(result):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Note a storage as it is now; it is forgotten when it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._hosted:
            return
        if key not in self._live:
            # Torch keeps one Python object of a storage as long as its memory lives.
            weakref.finalize(storage, self._free, key)
            if self._hosting:
                self._keep_on_host(key, self._allocated(size))
                return
        change = size - self._live.get(key, 0)
        self._bytes += change
        self._live[key] = size
        self._peak = max(self._peak, self._bytes)
        self._changed(key, change)

    def _allocated(self, size: int) -> int:
        """What a tensor in host memory takes there."""
        return int(pinned_bytes(size)) if self._pins else size

    def _keep_on_host(self, key: int, size: int) -> None:
        self._hosted[key] = size
        self._host_bytes += size
        self._host_peak = max(self._host_peak, self._host_bytes)

    def _changed(self, key: int, num_bytes: int) -> None:
        """Hook for subclasses: a storage changed its size by so much."""

    def _free(self, key: int) -> None:
        self._bytes -= self._live.pop(key, 0)
        self._host_bytes -= self._hosted.pop(key, 0)

    def _note(self, func: OpOverload, args: tuple[Any, ...], result: object) -> None:
        kind = KINDS.get(func._opname)
        if kind is None:
            return
        group = _group_of(args)
        # Within one rank nothing moves.
        if group is not None and group.size() == 1:
            return
        name = "" if group is None else str(group.group_name)
        axis = "pp" if kind in ("send", "receive") else self._axes.get(name, "world")
        # The larger of input and output is the whole buffer.
        sizes = (t.numel() * t.element_size() for t in _tensors((args, result)))
        self._row(axis, kind, max(sizes, default=0))

    def _row(self, axis: str, kind: str, num_bytes: int) -> None:
        row = self._rows.setdefault((axis, kind), [0, 0])
        row[0] += 1
        row[1] += num_bytes


def _tensors(value: object) -> Iterator[torch.Tensor]:
    return (x for x in tree_leaves(value) if isinstance(x, torch.Tensor) and not x.is_meta)


def _group_of(args: tuple[Any, ...]) -> dist.ProcessGroup | None:
    """The process group among the arguments of a collective: an object, or its name."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            group: dist.ProcessGroup = dist.ProcessGroup.unbox(arg)
            return group
    name = next((arg for arg in reversed(args) if isinstance(arg, str)), None)
    return None if name is None else _resolve_process_group(GroupName(name))
