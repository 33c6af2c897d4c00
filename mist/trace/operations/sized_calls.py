"""Calls of a model that give tensors a size: their numbers, and which call of a forward they are.

A model may write a number of heads, or a width, into its code: `x.view(b, s, 16, 64)`. On a rank
that holds 1/t of the heads the number is smaller, whether it is an attribute, a global, or made
from the shape of another tensor. The trace finds which numbers those are (`local_sizes`), and a run
on several ranks changes the same ones: a *size rule* of the n-th such call of a module's forward.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType, MappingProxyType
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]
Number = int | torch.SymInt | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalNumber:
    """A number on a rank: of the whole model, as the code gives it or `whole`; `divided` by t."""

    whole: int | None
    divided: bool

    def at(self, number: Number, num_ranks: int) -> Number:
        """The number on one of `num_ranks` ranks."""
        whole = number if self.whole is None else self.whole
        return whole // num_ranks if self.divided and whole is not None else whole


@dataclass(frozen=True, slots=True, kw_only=True)
class OperandPart:
    """The dimension of a whole tensor of which a rank takes its part.

    `block`: how many elements make one whole there, where samples repeat it ([batch * heads]); a
    rank takes its part of each.
    """

    dim: int
    block: int | None

    def of(self, tensor: torch.Tensor, start: int, size: int) -> torch.Tensor:
        """`size` elements from `start` on, along the dimension or of each of its blocks."""
        if self.block is None:
            return tensor.narrow(self.dim, start, size)
        blocks: torch.Tensor = tensor.unflatten(self.dim, (-1, self.block))
        return blocks.narrow(self.dim + 1, start, size).flatten(self.dim, self.dim + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeRule:
    """What is smaller in one call on a rank.

    `numbers`: by their place among the numbers of the call. `operands`: whole tensors by their
    place among the arguments.
    """

    numbers: Mapping[int, LocalNumber]
    operands: Mapping[int, OperandPart]


@dataclass(frozen=True, slots=True, kw_only=True)
class SizedCall:
    """One call with its tensor and its numbers; `rebuild` makes arguments from other numbers.

    `dim`: the dimension that is cut, or replaced by several.
    """

    name: str
    tensor: torch.Tensor
    numbers: list[Number]
    rebuild: Callable[[Sequence[Number]], Args]
    dim: int | None = None


def _is_size(value: object) -> bool:
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def _with_sizes(name: str, args: Args, kwargs: Kwargs) -> SizedCall | None:
    """view, reshape, expand: (x, *sizes) or (x, sizes)."""
    x, *rest = (*args, *kwargs.values())
    sizes = list(rest[0]) if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
    if not sizes or not all(map(_is_size, sizes)):
        return None
    return SizedCall(
        name=name, tensor=x, numbers=sizes, rebuild=lambda numbers: (x, tuple(numbers))
    )


def _unflatten(name: str, args: Args, kwargs: Kwargs) -> SizedCall | None:
    x, dim, sizes = (*args, *kwargs.values())
    if not isinstance(dim, int) or not all(map(_is_size, sizes)):
        return None
    return SizedCall(
        name=name, tensor=x, numbers=list(sizes), dim=dim % x.dim(),
        rebuild=lambda numbers: (x, dim, tuple(numbers)),
    )  # fmt: skip


def _split(name: str, args: Args, kwargs: Kwargs) -> SizedCall | None:
    """split, chunk: (x, size, number or sizes, dim=0)."""
    x, number, dim = (*args, *kwargs.values(), 0)[:3]
    if not isinstance(dim, int):
        return None
    several = isinstance(number, tuple | list)
    numbers = list(number) if several else [number]
    return SizedCall(
        name=name, tensor=x, numbers=numbers, dim=dim % x.dim(),
        rebuild=lambda new: (x, list(new) if several else new[0], dim),
    )  # fmt: skip


def _index(name: str, args: Args, kwargs: Kwargs) -> SizedCall | None:
    """x[..., a:b]: the bounds of the one slice that has some."""
    x, index = args
    items = list(index) if isinstance(index, tuple) else [index]
    cuts = [i for i, item in enumerate(items) if isinstance(item, slice) and item != slice(None)]
    plain = all(item is None or item is Ellipsis or isinstance(item, slice) for item in items)
    if len(cuts) != 1 or not plain or items[cuts[0]].step is not None:
        return None
    place, bounds = cuts[0], items[cuts[0]]
    before = sum(isinstance(item, slice) for item in items[:place])
    behind = sum(isinstance(item, slice) for item in items[place:])
    dim = x.dim() - behind if Ellipsis in items[:place] else before
    return SizedCall(
        name=name, tensor=x, numbers=[bounds.start, bounds.stop], dim=dim,
        rebuild=lambda new: (x, (*items[:place], slice(*new), *items[place + 1 :])),
    )  # fmt: skip


# By name, as a model may call torch.reshape or Tensor.reshape.
SIZED: Final[Mapping[str, Callable[[str, Args, Kwargs], SizedCall | None]]] = MappingProxyType(
    dict.fromkeys(("view", "reshape", "expand", "broadcast_to"), _with_sizes)
    | dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _split)
    | {"unflatten": _unflatten, "__getitem__": _index}
)
# Operations on tensors of one shape: a whole table of heads meets a rank's share of the heads.
TOGETHER: Final = frozenset(
    {
        "add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "baddbmm", "masked_fill",
        "masked_fill_", "where",
    }
)  # fmt: skip
ATTENTION: Final = "scaled_dot_product_attention"
MASK: Final = "attn_mask"


class SizedCalls(TorchFunctionMode):
    """Sees the calls that `SIZED` and `TOGETHER` name, numbered in the forward of each module."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[_Frame] = []

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Args = (),
        kwargs: Kwargs | None = None,
    ) -> object:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if self.frames and (name in SIZED or name in TOGETHER or name == ATTENTION):
            frame = self.frames[-1]
            args, kwargs = self.mend(frame.module, frame.num_calls, name, args, kwargs)
            frame.num_calls += 1
        if func is F.multi_head_attention_forward:
            with self:
                return _by_its_calls(func)(*args, **kwargs)
        return func(*args, **kwargs)

    def mend(
        self, module: nn.Module, number: int, name: str, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        """The arguments that a rank's call has, of call `number` in the forward of a module."""
        raise NotImplementedError

    def enter(self, module: nn.Module, args: object) -> None:
        """A module's forward begins."""
        self.frames.append(_Frame(module))

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        """A module's forward ends."""
        self.frames.pop()


def _by_its_calls(function: Callable[..., object]) -> Callable[..., object]:
    """A function of torch that modes see as one call, for them to see what it calls."""
    assert isinstance(function, FunctionType)
    seen_through = {"has_torch_function": lambda tensors: False, "_in_projection": _in_projection}
    names = function.__globals__ | seen_through
    code, defaults = function.__code__, function.__defaults__
    return FunctionType(code, names, function.__name__, defaults, function.__closure__)


def _in_projection(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *weights_then_biases: torch.Tensor | None
) -> list[torch.Tensor]:
    """Torch's, which would refuse matrices of which a rank has a part."""
    matrices, biases = weights_then_biases[:3], weights_then_biases[3:]
    inputs = zip((q, k, v), matrices, biases, strict=True)
    return [F.linear(x, w, b) for x, w, b in inputs if w is not None]


@contextmanager
def uncounted() -> Iterator[None]:
    """Within: calls are those of a stand-in, which no module's forward makes by itself."""
    stack = _get_current_function_mode_stack()
    modes = [mode for mode in stack if isinstance(mode, SizedCalls)]
    for mode in modes:
        mode.frames.append(_Frame(nn.Identity()))
    try:
        yield
    finally:
        for mode in modes:
            mode.frames.pop()


@dataclass(slots=True)
class _Frame:
    """A forward that runs, and how many calls of it were seen."""

    module: nn.Module
    num_calls: int = field(default=0)


def sized_call(name: str, args: Args, kwargs: Kwargs) -> SizedCall | None:
    """The numbers of a call; None where it has none."""
    return SIZED[name](name, args, kwargs) if name in SIZED else None


def operands_of(name: str, args: Args, kwargs: Kwargs) -> dict[int, torch.Tensor]:
    """The tensors that meet in a call, by place: of attention its queries and its mask."""
    values = [*args, *kwargs.values()]
    if name == ATTENTION:
        names = [*("query", "key", "value", MASK)[: len(args)], *kwargs]
        values = [v if n in ("query", MASK) else None for n, v in zip(names, values, strict=False)]
    return {i: value for i, value in enumerate(values) if isinstance(value, torch.Tensor)}


def with_operands(
    args: Args, kwargs: Kwargs, parts: Mapping[int, torch.Tensor]
) -> tuple[Args, Kwargs]:
    """Arguments with other tensors at some places."""
    values = [parts.get(i, value) for i, value in enumerate((*args, *kwargs.values()))]
    return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))
