"""Times calls on all ranks at once, and keeps the readings.

A sample repeats the call until it is long enough to be timed; what the calls give is held until the
sample ends, as training holds activations, so that memory is as fresh as there.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median, quantiles
from typing import Final

import torch
import torch.distributed as dist

from mist.exec.profiling.busy import Busy
from mist.exec.profiling.readings import Reading
from mist.exec.profiling.sizes import Sizes

SAMPLE_S: Final = 2e-3
LEAST, MOST = 5, 40  # samples of a reading
HELD_BYTES: Final = 64 * 2**20  # by what one sample's calls give
BRIEF_S: Final = 0.02  # a reading that is allowed less takes two samples, however uncertain
QUIET_RATIO: Final = 0.1  # of the processors
TOLD_S: Final = 0.2  # processor seconds from which on the system's ticks of 10 ms tell a share

Call = Callable[[], object]


@dataclass(slots=True, kw_only=True)
class Clock:
    """Measures on one device, at sizes of its kind.

    `reading_s`: how long one reading may take. Sizes at which one call takes more than `longest_s`
    are left out. A reading during which other programs were busy is taken again, and the quietest
    is kept, until `patience_s` have been spent so.
    """

    device: torch.device
    sizes: Sizes
    reading_s: float
    longest_s: float
    patience_s: float
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
        least = LEAST if self.reading_s >= BRIEF_S else 2
        count = min(max(int(self.reading_s / (repeats * guess_s)), least), MOST)
        tries: list[Reading] = []
        while not tries or self._is_blurred(tries[-1]):
            before, begin = Busy.now(), time.monotonic()
            samples = [self._sample(calls[i % len(calls)], repeats) for i in range(count)]
            tries.append(self._reading(op, sizes, samples, Busy.now().since(before)))
            if len(tries) > 1:
                self.patience_s -= self._slowest(time.monotonic() - begin)
        best = min(tries, key=lambda each: each.others_ratio)
        self.rows.append(best)
        return best.seconds

    def _is_blurred(self, last: Reading) -> bool:
        """Whether to read again, because other programs were busy; for a while only."""
        return last.others_ratio > QUIET_RATIO and self.patience_s > 0

    def _reading(
        self, op: str, sizes: Mapping[str, float], samples: Sequence[float], busy: Busy
    ) -> Reading:
        low, middle, high = quantiles(samples, n=4)
        return Reading(
            op=op,
            sizes=dict(sizes),
            seconds=self._slowest(median(samples)),
            spread_ratio=(high - low) / middle,
            others_ratio=self.others_ratio(busy),
            count=len(samples),
        )

    def note(self, op: str, sizes: Mapping[str, float], seconds: float) -> None:
        """Keep a figure (seconds or a ratio) that was put together from others."""
        row = Reading(
            op=op, sizes=sizes, seconds=seconds, spread_ratio=0.0, others_ratio=0.0, count=1
        )
        self.rows.append(row)

    def others_ratio(self, busy: Busy) -> float:
        """Share of the processors that none of the ranks had, the same on all of them."""
        own = torch.tensor(busy.own_s, dtype=torch.float64, device=self.device)
        dist.all_reduce(own)
        told = busy.all_s > TOLD_S
        return self._slowest(replace(busy, own_s=float(own)).others_ratio if told else 0.0)

    def waits_ratio(self, call: Call) -> float:
        """Share of a call's time that passes before it returns (0..1): 1 where the host is busy."""
        samples = []
        for _ in range(LEAST):
            dist.barrier()
            self.wait()
            begin = time.perf_counter()
            call()
            returned = time.perf_counter() - begin
            self.wait()
            samples.append(returned / (time.perf_counter() - begin))
        return round(self._slowest(median(samples)), 2)

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

    def warm(self, call: Call) -> None:
        """Repeat a call for as long as the device takes to get warm: clocks fall under load."""
        end = time.monotonic() + self.sizes.warm_s
        while time.monotonic() < end:
            call()
            self.wait()

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _slowest(self, seconds: float) -> float:
        """The largest of all ranks' figures."""
        worst = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        return float(worst)
