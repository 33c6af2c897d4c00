"""Copies between device and host that run at the same time as the computation.

On CUDA a copy runs on a side stream, to or from pinned memory. Its tensor on the device is of the
stream that computes, and is held until that stream has waited for the copy. So its memory is free
in the order in which the computation was issued, however far the host is ahead: if the allocator
had to ask whether the side stream is done (`record_stream`), a host that is ahead would be told no
each time, and take new memory. On a machine without CUDA the same calls copy at once: the code that
decides what moves, when, and what is held, is the same.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(slots=True, kw_only=True)
class Copy:
    """A tensor on its way, with the event to wait for (None: it is there).

    `source`: on its way to the host, what it is read from; held until it is waited for.
    """

    tensor: torch.Tensor
    event: torch.cuda.Event | None = None
    source: torch.Tensor | None = None

    def wait(self) -> torch.Tensor:
        """The tensor, for the current stream."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)
        self.source = None
        return self.tensor

    def arrived(self) -> None:
        """Block until the host may read the tensor."""
        if self.event is not None:
            self.event.synchronize()
        self.source = None


def wait_for_all(copies: Sequence[Copy]) -> None:
    """Wait for copies of one way, on the current stream: they end in the order they began in."""
    if copies:
        copies[-1].wait()
    for copy in copies:
        copy.source = None


def register(tensor: torch.Tensor) -> None:
    """Pin the memory of a tensor until it is freed. Raises torch.cuda.CudaError."""
    runtime, storage = torch.cuda.cudart(), tensor.untyped_storage()
    torch.cuda.check_error(runtime.cudaHostRegister(storage.data_ptr(), storage.nbytes(), 0))
    freed = weakref.finalize(tensor, runtime.cudaHostUnregister, storage.data_ptr())
    freed.atexit = False  # the process ends, and all that it has registered with it


class Swapper:
    """One stream out and one stream in. `quietly`: what host memory is allocated in (`measure`).

    `overlap` False: copies and computation wait for each other, to measure what overlap hides.
    """

    def __init__(self, device: torch.device, *, overlap: bool = True) -> None:
        self.device = device
        self.quietly: Callable[[], AbstractContextManager[object]] = nullcontext
        self._pins = device.type == "cuda"
        self._asynchronous = self._pins and overlap
        self._out = torch.cuda.Stream(device) if self._asynchronous else None
        self._in = torch.cuda.Stream(device) if self._asynchronous else None

    def to_host(self, tensor: torch.Tensor, into: torch.Tensor | None = None) -> Copy:
        """Copy to the host, into a tensor there if given."""
        target = self.empty_on_host(tensor) if into is None else into
        with self._after_current(self._out):
            target.copy_(tensor, non_blocking=self._asynchronous)
        return Copy(tensor=target, event=self._event(self._out), source=tensor)

    def to_device(self, copy: Copy) -> Copy:
        """Bring back what a copy took out. Keep the result until the current stream has waited."""
        if copy.source is not None:
            # It has not left yet: its memory is still held.
            return Copy(tensor=copy.source, event=copy.event)
        # The current stream has waited for the way out, and the copy comes behind it.
        tensor = torch.empty_like(copy.tensor, device=self.device)
        with self._after_current(self._in):
            tensor.copy_(copy.tensor, non_blocking=self._asynchronous)
        return Copy(tensor=tensor, event=self._event(self._in))

    def empty_on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Host memory of a tensor's shape and strides, pinned where that helps."""
        with self.quietly():
            return torch.empty_like(tensor, device="cpu", pin_memory=self._pins)

    def zeros_on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Zeros in host memory for good, pinned where that helps, and no larger than they are.

        Torch's pinned blocks are powers of two; memory that is registered with the driver is not.
        Raises torch.cuda.CudaError where the driver refuses.
        """
        target = torch.zeros_like(tensor, device="cpu")
        if self._pins and target.nbytes:
            register(target)
        return target

    def _after_current(self, stream: "torch.cuda.Stream | None") -> AbstractContextManager[object]:
        if stream is None:
            return nullcontext()
        # A copy begins when the computation that makes the tensor is done.
        stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(stream)

    def _event(self, stream: "torch.cuda.Stream | None") -> torch.cuda.Event | None:
        return None if stream is None else stream.record_event()
