"""Host memory: what the ranks of one node take of it, amid a step and while they are built.

Amid a step they hold what is offloaded. While they are built each rank also holds, whole and in
fp32, the module whose initial weights it draws (`mist.exec.build.initial_weights`): the ranks of a
node do so at the same time.

Memory that a GPU copies to and from is pinned. Torch pins each tensor by itself, in a block whose
size is a power of two: blocks of few sizes are used again more often.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mist.plans.provenance import Kind
from mist.units import GB, format_bytes


def pinned_bytes(num_bytes: ArrayLike) -> NDArray[np.float64]:
    """Bytes of pinned host memory that a tensor of `num_bytes` takes: the next power of two.

    Source: torch 2.13, ATen/core/CachingHostAllocator.h, `allocate` (PowerOf2Ceil, of all sizes
    unless pinned_max_round_threshold_mb is set).
    """
    size = np.asarray(num_bytes, dtype=np.float64)
    # frexp is exact, where a logarithm may round at the powers of two themselves.
    _, exponent = np.frexp(size)
    below = np.ldexp(1.0, exponent - 1)  # the largest power of two up to the size
    rounded = np.where(below < size, 2.0 * below, below)
    return np.asarray(np.where(size > 0, rounded, 0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class HostNeed:
    """Bytes that the fullest node needs, and what a node has.

    `held_bytes`: offloaded, amid a step. `loading_bytes`: the most while weights are drawn, and
    `drawn_bytes` of it what one rank draws at a time; None where the runtime's way of loading is
    not known. `memory_bytes`: of a node, with its `kind` and `source`; a plan may use `limit_bytes`
    of it.
    """

    held_bytes: int
    loading_bytes: int | None
    drawn_bytes: int | None
    memory_bytes: int
    limit_bytes: int
    kind: Kind
    source: str

    @property
    def needed_bytes(self) -> int:
        """The most at any time."""
        return max(self.held_bytes, self.loading_bytes or 0)

    @property
    def fits(self) -> bool:
        """Whether a plan may use as much."""
        return self.needed_bytes <= self.limit_bytes

    @property
    def words(self) -> str:
        """What is needed, what there is, how sure that is, and what of it a plan may use."""
        share = self.limit_bytes / self.memory_bytes
        return (
            f"needs {format_bytes(self.needed_bytes)} of host memory per node, of "
            f"{format_bytes(self.memory_bytes)} ({self.kind}), of which a plan may use {share:.0%}"
        )

    @property
    def over_words(self) -> str:
        """By how much a plan overflows, and when."""
        when = "" if self.needed_bytes == self.held_bytes else " while weights are drawn"
        return (
            f"needs {format_bytes(self.needed_bytes)} per node{when}, of the "
            f"{format_bytes(self.limit_bytes)} that a plan may use, over by "
            f"{format_bytes(self.needed_bytes - self.limit_bytes)}"
        )

    @property
    def fix(self) -> str:
        """The option that would make room, as `--host-memory` takes it."""
        asked_bytes = self.needed_bytes * self.memory_bytes / self.limit_bytes
        return f"--host-memory {math.ceil(asked_bytes / GB)}GB"
