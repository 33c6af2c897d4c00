"""Seconds of the parts of a step on one rank, taken without waiting for the device.

Forward and backward passes include what they wait for of their own stage: data- and tensor-parallel
collectives. On CUDA they are times of the stream that computes. What a step takes beyond its parts
are transfers along the pipeline and waiting for other stages.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

Part = Literal["forward", "backward", "sums", "optimizer"]
Mark = float | torch.cuda.Event


class StepClock:
    """Adds up the seconds of each part of a step."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Part, Mark, Mark]] = []

    def start(self) -> None:
        """A step begins."""
        self._spans.clear()

    @contextmanager
    def timing(self, part: Part) -> Iterator[None]:
        """Within: the time is that of this part."""
        begin = self._mark()
        yield
        self._spans.append((part, begin, self._mark()))

    def read(self) -> dict[Part, float]:
        """Seconds of each part of the step; on CUDA it must be done (synchronize)."""
        seconds: dict[Part, float] = dict.fromkeys(get_args(Part), 0.0)
        for part, begin, end in self._spans:
            seconds[part] += _between_s(begin, end)
        return seconds

    def _mark(self) -> Mark:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between_s(begin: Mark, end: Mark) -> float:
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    assert not (isinstance(begin, float) or isinstance(end, float))
    return float(begin.elapsed_time(end)) / 1e3
