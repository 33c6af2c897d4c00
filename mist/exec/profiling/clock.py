"""Times calls on all ranks at once, and keeps the readings.

A sample repeats the call until it is long enough to be timed; what the calls give is held until the
sample ends, as training holds activations, so that memory is as fresh as there.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Final

import torch
import torch.distributed as dist

from mist.exec.profiling.readings import Reading

SAMPLE_S: Final = 2e-3
LEAST, MOST = 5, 40  # samples of a reading
HELD_BYTES: Final = 64 * 2**20  # by what one sample's calls give

Call = Callable[[], object]


@dataclass(slots=True, kw_only=True)
class Clock:
    """Measures on one device; `reading_s`: how long one reading may take."""

    device: torch.device
    reading_s: float
    rows: list[Reading] = field(default_factory=list)

    def read(
        self, op: str, sizes: Mapping[str, float], *calls: Call, held_bytes: float = 0
    ) -> float:
        """Median seconds of a call. Several calls take turns: ways of doing the same.

        `held_bytes`: what one call gives. Every rank calls this with the same arguments.
        """
        for call in calls:
            call()
        guess_s = self._slowest(max(self._sample(call, 1) for call in calls))
        repeats = max(1, math.ceil(SAMPLE_S / guess_s))
        if held_bytes:
            repeats = max(1, min(repeats, int(HELD_BYTES / held_bytes)))
        fitting = int(self.reading_s / (repeats * guess_s))
        count = min(max(fitting, LEAST), MOST)
        samples = [self._sample(calls[i % len(calls)], repeats) for i in range(count)]
        low, middle, high = quantiles(samples, n=4)
        seconds = self._slowest(median(samples))
        row = Reading(
            op=op,
            sizes=dict(sizes),
            seconds=seconds,
            spread_ratio=(high - low) / middle,
            count=count,
        )
        self.rows.append(row)
        return seconds

    def note(self, op: str, sizes: Mapping[str, float], seconds: float) -> None:
        """Keep a figure that was put together from others."""
        self.rows.append(Reading(op=op, sizes=sizes, seconds=seconds, spread_ratio=0.0, count=1))

    def until_returned(self, call: Call) -> float:
        """Median seconds until a call returns, its work done or not."""
        samples = []
        for _ in range(LEAST):
            dist.barrier()
            self.wait()
            begin = time.perf_counter()
            call()
            samples.append(time.perf_counter() - begin)
        return self._slowest(median(samples))

    def _sample(self, call: Call, repeats: int) -> float:
        """Seconds of one of `repeats` calls in a row, begun by all ranks together."""
        dist.barrier()
        self.wait()
        begin = time.perf_counter()
        held = [call() for _ in range(repeats)]
        self.wait()
        seconds = (time.perf_counter() - begin) / repeats
        del held
        return seconds

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _slowest(self, seconds: float) -> float:
        """The largest of all ranks' figures."""
        worst = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        return float(worst)
