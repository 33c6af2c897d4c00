"""Sizes that routing decides: how many tokens an expert gets, where a model selects them by value.

A layer that sends every token to k of its E experts and picks each expert's rows with nonzero,
where or a boolean mask, or splits rows that are sorted by expert at counts of each expert, has
sizes that only data know. They are bound to the rows of a balanced
expert, b s k c / E, with the capacity ratio c of the setting (1 by default). Whatever the routing,
the rows of all experts sum to b s k, so sums over the experts hold for c = 1 without balance.
E and k are read from the module that runs or those around it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import sympy
import torch
from torch import nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from mist.model.graph import B, S
from mist.trace.dispatch_call import key_of
from mist.trace.expressions import Size, Symbols

aten = torch.ops.aten

EXPERTS: Final = ("num_experts", "n_routed_experts", "num_local_experts", "n_experts")
CHOSEN: Final = ("top_k", "topk", "num_experts_per_tok", "experts_per_token", "n_active_experts")


class _Counts:
    """A list that may count rows. It lives no longer for that, but no storage has its key again."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype, self.length = tensor.dtype, tensor.shape[0]
        self._storage = StorageWeakRef(tensor.untyped_storage())


class Routing(TorchDispatchMode):
    """Gives what selects rows by value the size of a balanced expert's rows.

    `callers`: the modules that run, outermost first. `hints`: typical b and s; `sizes`: those of
    the run, numbers or symbols.
    """

    def __init__(
        self,
        symbols: Symbols,
        callers: Sequence[nn.Module],
        hints: Mapping[sympy.Expr, int],
        sizes: Mapping[sympy.Expr, sympy.Expr | int],
        capacity_ratio: float,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.experts: dict[tuple[int, int], Size] = {}
        self._counts: dict[int, _Counts] = {}
        self._symbols = symbols
        self._callers = callers
        self._hints, self._sizes = hints, sizes
        self._capacity = sympy.Rational(str(capacity_ratio))

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        rows = self._rows() if self._is_routing(func, args) else None
        if rows is None:
            return self._noted(func, args, func(*args, **(kwargs or {})))
        if func is NUMBER_OF:
            return rows
        if func in SELECTIONS:
            return SELECTIONS[func](rows, *args)
        first, indices, *rest = args
        return func(first, list(_numbers(rows, indices)), *rest, **(kwargs or {}))

    def _is_routing(self, func: OpOverload, args: tuple[Any, ...]) -> bool:
        """Whether a call selects rows by value, or reads how many an expert has."""
        if func is NUMBER_OF:
            return self._is_count(args[0])
        return func in SELECTIONS or (func in INDEXING and any(map(_is_mask, args[1])))

    def _noted(self, func: OpOverload, args: tuple[Any, ...], out: object) -> object:
        """Remember a list of counts, and copies of one; running sums of them are none."""
        packet = func.overloadpacket
        copied = packet in COPIES and key_of(args[0]) in self._counts
        if (copied or packet in COUNTING) and isinstance(out, torch.Tensor) and out.dim() == 1:
            self._counts[key_of(out)] = _Counts(out)
        return out

    def _is_count(self, tensor: torch.Tensor) -> bool:
        """Whether this is a number of a list that counts the rows of each expert."""
        counts = self._counts.get(key_of(tensor))
        if counts is None or counts.dtype not in (torch.int32, torch.int64):
            return False
        return self._number(EXPERTS) == counts.length

    def _rows(self) -> Size | None:
        """Rows of one expert where the model is routing, else None."""
        count, chosen = self._number(EXPERTS), self._number(CHOSEN)
        if count is None or chosen is None:
            return None
        if (count, chosen) not in self.experts:
            meaning = (B * S * chosen * self._capacity / count).subs(self._sizes)
            # Torch specialises sizes 0 and 1.
            hint = max(int(meaning.subs(self._hints)), 2)
            name = f"rows{count}_{chosen}"
            self.experts[count, chosen] = self._symbols.create(name, hint=hint, meaning=meaning)
        return self.experts[count, chosen]

    def _number(self, names: Iterable[str]) -> int | None:
        """The first of these attributes that a running module or its config has."""
        # The innermost module first: it may have another number than the model.
        for module in reversed(self._callers):
            for owner in (module, getattr(module, "config", None)):
                values = (getattr(owner, name, None) for name in names)
                if (value := next((v for v in values if type(v) is int), None)) is not None:
                    return value
        return None


def _nonzero(rows: Size, mask: torch.Tensor) -> torch.Tensor:
    return mask.new_empty((rows, mask.dim()), dtype=torch.int64)


def _masked_select(rows: Size, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return values.new_empty((rows,))


SELECTIONS: Final[Mapping[OpOverload, Callable[..., torch.Tensor]]] = MappingProxyType(
    {aten.nonzero.default: _nonzero, aten.masked_select.default: _masked_select}
)
COUNTING: Final = frozenset(
    {aten.sum, aten.bincount, aten.histc, aten.scatter_add, aten.scatter_add_, aten.index_add}
)
COPIES: Final = frozenset({aten._to_copy, aten.clone})
NUMBER_OF: Final = aten._local_scalar_dense.default
INDEXING: Final = frozenset(
    {
        aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
        aten._index_put_impl_.default, aten._unsafe_index.Tensor,
    }
)  # fmt: skip


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _numbers(rows: Size, indices: Sequence[torch.Tensor | None]) -> Iterator[torch.Tensor | None]:
    """Indices with row numbers in the place of masks: one index for each dimension of a mask."""
    for index in indices:
        if index is not None and _is_mask(index):
            yield from (index.new_empty((rows,), dtype=torch.int64) for _ in range(index.dim()))
        else:
            yield index
