"""Which runs of layers a stage may take."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mist.pareto.strategies import Ints
from mist.symbolic.job import Job


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ranges:
    """Layer ranges [R]; where all layers are alike one stands for all with its count, `alike`."""

    first: Ints
    count: Ints
    alike: bool

    def __len__(self) -> int:
        return len(self.count)

    def take(self, rows: NDArray[np.bool_]) -> "Ranges":
        """Some of them."""
        return replace(self, first=self.first[rows], count=self.count[rows])

    def distinct(self, job: Job) -> tuple["Ranges", Ints]:
        """One range of each sequence of kinds, and which of them each is like, [R].

        Layers that are alike cost the same wherever they are: a stage depends on its sequence.
        """
        if self.alike:
            return self, np.arange(len(self))
        kind_of_layer = np.diff(job.kind_prefix, axis=1).argmax(axis=0)
        offset = np.arange(max(self.count, default=0))
        layers = np.minimum(self.first[:, None] + offset, job.num_layers - 1)
        sequence = np.where(offset < self.count[:, None], kind_of_layer[layers], -1)
        _, rows, index = np.unique(sequence, axis=0, return_index=True, return_inverse=True)
        return replace(self, first=self.first[rows], count=self.count[rows]), index


def layer_ranges(job: Job, num_stages: int, *, least: int = 1) -> Ranges:
    """Ranges of at least `least` layers that leave as many for each other stage."""
    num_layers = job.num_layers
    longest = num_layers - least * (num_stages - 1)
    counts = np.arange(least, longest + 1)
    if job.facts.num_kinds == 1:
        return Ranges(first=np.zeros_like(counts), count=counts, alike=True)
    grid = np.meshgrid(np.arange(num_layers), counts, indexing="ij")
    first, count = (axis.ravel() for axis in grid)
    inside = first + count <= num_layers
    return Ranges(first=first[inside], count=count[inside], alike=False)


def placed(ranges: Ranges, num_layers: int, num_stages: int, stage: int) -> NDArray[np.bool_]:
    """Which ranges `stage` may take: it leaves i layers before it and S - 1 - i behind, [R]."""
    if ranges.alike:
        return np.ones(len(ranges), dtype=np.bool_)
    behind = num_layers - ranges.first - ranges.count
    starts = ranges.first == 0 if stage == 0 else ranges.first >= stage
    last = stage == num_stages - 1
    return np.asarray(starts & (behind == 0 if last else behind >= num_stages - 1 - stage))


def kinds_of(job: Job, ranges: Ranges) -> Ints:
    """Layers of each kind in each range, [Q, R]."""
    stop = ranges.first + ranges.count
    return np.stack([prefix[stop] - prefix[ranges.first] for prefix in job.kind_prefix])
