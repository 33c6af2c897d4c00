"""Host memory: what the ranks of one node take of it, amid a step and while they are built.

Amid a step they hold what is offloaded. While they are built each rank also holds, whole and in
fp32, the module whose initial weights it draws (`mist.exec.weights`): the ranks of a node do so at
the same time.
"""

import math
from dataclasses import dataclass

from mist.origin import Kind
from mist.units import GB, format_bytes


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
