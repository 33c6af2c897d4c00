"""Copies between device and host that run at the same time as the computation.

On CUDA a copy runs on a side stream into pinned memory; who uses its result waits for its event,
and the caching allocator must know which stream still reads a tensor. On a machine without CUDA the
same calls copy at once: the code that decides what moves, and when, is the same.
"""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(slots=True, kw_only=True)
class Copy:
    """A tensor on its way, with the event to wait for (None: it is there)."""

    tensor: torch.Tensor
    event: torch.cuda.Event | None = None

    def wait(self) -> torch.Tensor:
        """The tensor, for the current stream."""
        if self.event is not None:
            current = torch.cuda.current_stream()
            current.wait_event(self.event)
            if self.tensor.is_cuda:
                # It was allocated on the side stream: the allocator must not reuse its memory
                # before this stream has read it.
                self.tensor.record_stream(current)
        return self.tensor

    def arrived(self) -> None:
        """Block until the host may read the tensor."""
        if self.event is not None:
            self.event.synchronize()


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
            if self._out is not None:
                # The caller may drop the tensor before the copy has run.
                tensor.record_stream(self._out)
        return Copy(tensor=target, event=self._event(self._out))

    def to_device(self, copy: Copy) -> Copy:
        """Bring back what a copy took out."""
        with self._after_current(self._in):
            # It may still be on its way out.
            if copy.event is not None and self._in is not None:
                self._in.wait_event(copy.event)
            tensor = copy.tensor.to(self.device, non_blocking=self._asynchronous, copy=True)
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
