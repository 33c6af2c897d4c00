"""Times calls on all ranks at once, and keeps the readings.

A sample repeats the call until it is long enough to be timed; what the calls give is held until the
sample ends, as training holds activations, so that memory is as fresh as there.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean, median, quantiles
from typing import Final

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from mist.exec.profiling.busy import Busy
from mist.exec.profiling.readings import Reading, Request
from mist.exec.profiling.sizes import SIZES, Sizes

SAMPLE_S: Final = 2e-3
LEAST, MOST = 5, 40  # samples of a reading
HELD_BYTES: Final = 64 * 2**20  # by what one sample's calls give
BRIEF_S: Final = 0.02  # a reading that is allowed less takes two samples, however uncertain
QUIET_RATIO: Final = 0.1  # of the processors
LONGEST_RATIO: Final = 1 / 200  # of the time asked for, for one call
PATIENCE_RATIO: Final = 1.5  # of the time asked for, on top, where other programs are busy
MEASURABLE_S: Final = 0.2  # processor seconds; the system counts them in ticks of 10 ms

Call = Callable[[], object]
Seconds = NDArray[np.float64]


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

    @classmethod
    def within(cls, request: Request, device: torch.device) -> "Clock":
        """A clock whose readings take about the time that is asked for."""
        sizes = SIZES[device.type]
        return cls(
            device=device,
            sizes=sizes,
            reading_s=request.seconds / sizes.num_readings,
            longest_s=LONGEST_RATIO * request.seconds,
            patience_s=PATIENCE_RATIO * request.seconds,
        )

    def read(
        self, op: str, sizes: Mapping[str, float], *calls: Call, held_bytes: float = 0
    ) -> float:
        """Median seconds of a call. Several calls take turns: ways of doing the same.

        `held_bytes`: what one call gives. Every rank calls this with the same arguments.
        """
        for call in calls:
            call()
        # The figure of the slowest rank, so that all ranks repeat alike: their collectives must
        # meet.
        guess_s = self._slowest(max(self._sample(call, 1) for call in calls))
        repeats = max(1, math.ceil(SAMPLE_S / guess_s))
        if held_bytes:
            repeats = max(1, min(repeats, int(HELD_BYTES / held_bytes)))
        count = self._count(repeats * guess_s)

        def take() -> list[float]:
            return [self._sample(calls[i % len(calls)], repeats) for i in range(count)]

        return self._keep(op, sizes, take, lambda samples: self._slowest(median(samples)))

    def read_amid(self, op: str, sizes: Mapping[str, float], call: Call, work: Call) -> float:
        """Mean seconds of a call that follows each piece of work, as training meets it.

        Ranks do not begin together: who is done with its work waits for those that are not, at
        times for long. What the call adds to many pieces of work is the mean of ranks and samples.
        """
        self._amid(call, work, 1)
        begin = time.monotonic()
        self._amid(call, work, 1)
        count = self._count(self._slowest(time.monotonic() - begin))
        take = partial(self._amid, call, work, count)
        return self._keep(op, sizes, take, lambda samples: self._mean(fmean(samples)))

    def read_in_turn(
        self, op: str, sizes: Sequence[Mapping[str, float]], calls: Sequence[Call]
    ) -> list[Seconds]:
        """Seconds of each call in each round, in which all of them have a turn; a row for each."""
        for call in calls:
            call()
        round_s = sum(self._slowest(self._sample(call, 1)) for call in calls)
        count = self._count(round_s / len(calls))
        before = Busy.now()
        rounds = [[self._sample(call, 1) for call in calls] for _ in range(count)]
        others = self.others_ratio(Busy.now().since(before))
        rows = [*zip(*rounds, strict=True)]
        self.rows += [
            _reading(op, size, row, self._slowest(median(row)), others)
            for size, row in zip(sizes, rows, strict=True)
        ]
        return [np.array([self._slowest(s) for s in row]) for row in rows]

    def _count(self, sample_s: float) -> int:
        """How many samples a reading has time for."""
        least = LEAST if self.reading_s >= BRIEF_S else 2
        return min(max(int(self.reading_s / sample_s), least), MOST)

    def _keep(
        self,
        op: str,
        sizes: Mapping[str, float],
        take: Callable[[], list[float]],
        combine: Callable[[list[float]], float],
    ) -> float:
        """Take samples until other programs are quiet, and keep the reading; its seconds."""
        tries: list[Reading] = []
        while not tries or (tries[-1].others_ratio > QUIET_RATIO and self.patience_s > 0):
            before, begin = Busy.now(), time.monotonic()
            samples = take()
            others = self.others_ratio(Busy.now().since(before))
            tries.append(_reading(op, sizes, samples, combine(samples), others))
            if len(tries) > 1:
                self.patience_s -= self._slowest(time.monotonic() - begin)
        # Of blurred readings the least blurred one.
        best = min(tries, key=lambda each: each.others_ratio)
        self.rows.append(best)
        return best.seconds

    def note(self, op: str, sizes: Mapping[str, float], seconds: float) -> None:
        """Keep a figure (seconds or a ratio) that was put together from others."""
        row = Reading(
            op=op, sizes=sizes, seconds=seconds, spread_ratio=0.0, others_ratio=0.0, count=1
        )
        self.rows.append(row)

    def others_ratio(self, busy: Busy) -> float:
        """Share of the processors that none of the ranks had, the same on all of them."""
        ranks_s = torch.tensor(busy.own_s, dtype=torch.float64, device=self.device)
        dist.all_reduce(ranks_s)
        is_measurable = busy.all_s > MEASURABLE_S
        return self._slowest(
            replace(busy, own_s=float(ranks_s)).others_ratio if is_measurable else 0.0
        )

    def waits_ratio(self, call: Call) -> float:
        """Share of a call's time that passes before it returns (0..1): 1 where the host is busy."""
        samples = []
        for _ in range(LEAST):
            dist.barrier()
            self.wait()
            begin = time.perf_counter()
            call()
            return_s = time.perf_counter() - begin
            self.wait()
            samples.append(return_s / (time.perf_counter() - begin))
        return round(self._slowest(median(samples)), 2)

    def _sample(self, call: Call, repeats: int) -> float:
        """Seconds of one of `repeats` calls in a row, begun by all ranks together."""
        dist.barrier()
        self.wait()
        begin = time.perf_counter()
        # Results live until the sample ends: fresh memory costs page faults.
        results = [call() for _ in range(repeats)]
        self.wait()
        seconds = (time.perf_counter() - begin) / repeats
        del results
        return seconds

    def _amid(self, call: Call, work: Call, count: int) -> list[float]:
        """Seconds of each of `count` calls, which take turns with work."""
        samples = []
        dist.barrier()
        for _ in range(count):
            work()
            self.wait()
            begin = time.perf_counter()
            call()
            self.wait()
            samples.append(time.perf_counter() - begin)
        return samples

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

    def _mean(self, seconds: float) -> float:
        """The mean of all ranks' figures."""
        total = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total) / dist.get_world_size()


def _reading(
    op: str, sizes: Mapping[str, float], samples: Sequence[float], seconds: float, others: float
) -> Reading:
    low, middle, high = quantiles(samples, n=4)
    return Reading(
        op=op,
        sizes=dict(sizes),
        seconds=seconds,
        spread_ratio=(high - low) / middle,
        others_ratio=others,
        count=len(samples),
    )
