"""Ends a run early, at too many operations of one part."""

from collections.abc import Sequence
from dataclasses import dataclass

from mist.errors import TraceError
from mist.model.graph import Op


class LimitReached(TraceError):
    """A run that is ended by its limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpLimit:
    """Where a run ends: at `max_ops` forward operations of one part."""

    max_ops: int

    def check(self, ops: Sequence[Op]) -> None:
        """Raise LimitReached when the last of a part's operations is beyond the limit."""
        if len(ops) > self.max_ops:
            raise LimitReached(f"a part runs more than {self.max_ops} operations.")
