"""Ends a run early: at too many operations of one part, or where one module has run."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mist.errors import TraceError
from mist.model.graph import Op


class LimitReached(TraceError):
    """A run that is ended by its limit. `module` ran `num_ops` operations by itself."""

    def __init__(self, module: str, num_ops: int) -> None:
        super().__init__(f"{module} runs {num_ops} operations or more.")
        self.module, self.num_ops = module, num_ops


@dataclass(frozen=True, slots=True, kw_only=True)
class OpLimit:
    """Where a run ends: at `max_ops` operations of one part, or when `module` has run."""

    max_ops: int | None = None
    module: str | None = None

    def check(self, ops: Sequence[Op]) -> None:
        """Raise LimitReached when the last of a part's operations is beyond the limit."""
        by_module = Counter(op.module for op in ops) if self._is_beyond(ops) else None
        if by_module:
            module = by_module.most_common(1)[0][0] if self.module is None else self.module
            raise LimitReached(module, by_module[module])

    def _is_beyond(self, ops: Sequence[Op]) -> bool:
        if self.max_ops is not None and len(ops) > self.max_ops:
            return True
        name, within = self.module, f"{self.module}."
        if not name or not ops or ops[-1].module == name or ops[-1].module.startswith(within):
            return False
        return any(op.module == name for op in ops)
