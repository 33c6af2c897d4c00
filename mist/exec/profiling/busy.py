"""How busy the processors are with programs that are not ours: they blur what is measured."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

STAT: Final = Path("/proc/stat")


@dataclass(frozen=True, slots=True, kw_only=True)
class Busy:
    """Processor seconds since the machine started (all, and idle), and of this program.

    `own_s` has that of children only once they have ended.
    """

    all_s: float
    idle_s: float
    own_s: float

    @classmethod
    def now(cls) -> "Busy":
        """As it is; zeros where the system does not tell."""
        if not STAT.is_file():
            return cls(all_s=0.0, idle_s=0.0, own_s=0.0)
        words = STAT.read_text(encoding="ascii").split("\n")[0].split()[1:9]
        seconds = [float(word) / os.sysconf("SC_CLK_TCK") for word in words]
        children = os.times()
        own_s = time.process_time() + children.children_user + children.children_system
        return cls(all_s=sum(seconds), idle_s=seconds[3] + seconds[4], own_s=own_s)

    def since(self, before: "Busy") -> "Busy":
        """What came on top."""
        return Busy(
            all_s=self.all_s - before.all_s,
            idle_s=self.idle_s - before.idle_s,
            own_s=self.own_s - before.own_s,
        )

    @property
    def others_ratio(self) -> float:
        """Share of all processors' time that other programs had (0..1)."""
        if self.all_s <= 0:
            return 0.0
        others_s = self.all_s - self.idle_s - self.own_s
        return round(min(max(others_s / self.all_s, 0.0), 1.0), 3)
