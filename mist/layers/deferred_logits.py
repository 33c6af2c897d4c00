"""A head that computes no logits until it is known what they are for.

The last matrix of a model gives a tensor that stands for the product x W^T. What only looks at it
otherwise (a view, a shift by one token, a wider type) gives another one; a cross-entropy runs by
`mist.layers.loss_heads`, without all logits at once; whatever else is asked of it gets the product.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mist.errors import InputError
from mist.layers.loss_heads import head_loss
from mist.plans.workload import HeadMode


@dataclass(slots=True, kw_only=True, eq=False)
class DeferredHead:
    """A head that runs in a mode, and how many losses went through it."""

    mode: HeadMode
    num_losses: int = 0

    def refuse_unused(self, model: str) -> None:
        """Raise InputError where no loss has: something else than a cross-entropy read them."""
        if not self.num_losses:
            raise InputError(
                f"head {self.mode}: the loss of {model} is no plain cross-entropy of what its last "
                "matrix gives. Use head none."
            )


class DeferredLogits(Tensor):
    """Stands for x W^T: x [..., h], W [V, h]."""

    x: Tensor
    weight: Tensor
    head: DeferredHead

    @staticmethod
    def of(x: Tensor, weight: Tensor, head: DeferredHead, dtype: torch.dtype) -> "DeferredLogits":
        """The logits of x [..., h], as a tensor of this type."""
        shape = (*x.shape[:-1], weight.shape[0])
        found = Tensor._make_wrapper_subclass(DeferredLogits, shape, dtype=dtype, device=x.device)
        found.x, found.weight, found.head = x, weight, head
        return found

    def of_rows(self, x: Tensor) -> "DeferredLogits":
        """The logits of other rows x."""
        return DeferredLogits.of(x, self.weight, self.head, self.dtype)

    def computed(self) -> Tensor:
        """The product itself."""
        return F.linear(self.x, self.weight).to(self.dtype)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **named)
        # A loss may be wrapped, to count what it is a mean of.
        handler = HANDLERS.get(inspect.unwrap(func))
        if handler is not None and args and isinstance(args[0], DeferredLogits):
            found = handler(*args, **named)
            if found is not None:
                return found
        plain_args, plain_named = tree_map(_computed, (args, dict(named)))
        return func(*plain_args, **plain_named)

    # What reaches the kernels below torch's functions gets the product, too.
    __torch_dispatch__ = __torch_function__  # type: ignore[assignment]  # torch's is a builtin


def _computed(value: object) -> object:
    return value.computed() if isinstance(value, DeferredLogits) else value


# Each returns None where the call needs the logits.


def _loss(
    rows: DeferredLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: object = None,
    ignore_index: int = -100,
    reduce: object = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    plain = (weight, size_average, reduce, label_smoothing) == (None, None, None, 0.0)
    if rows.dim() != 2 or not plain or target.is_floating_point() or reduction not in REDUCTIONS:
        return None
    rows.head.num_losses += 1
    return head_loss(
        rows.x,
        rows.weight,
        target,
        mode=rows.head.mode,
        ignore_index=ignore_index,
        reduction=reduction,  # type: ignore[arg-type]
    )


def _widened(dtype: torch.dtype, logits: DeferredLogits) -> DeferredLogits | None:
    """In a type that has all of their numbers."""
    if torch.promote_types(dtype, logits.dtype) != dtype:
        return None
    return DeferredLogits.of(logits.x, logits.weight, logits.head, dtype)


def _moved(logits: DeferredLogits, *where: object, **named: object) -> DeferredLogits | None:
    """To a type of floats, or to the device where they are."""
    if named or len(where) != 1:
        return None
    if isinstance(where[0], torch.dtype):
        return _widened(where[0], logits)
    return logits if where[0] in (logits.device, str(logits.device)) else None


def _viewed(logits: DeferredLogits, *shape: Any) -> DeferredLogits | None:
    """As rows of other shape, if the words stay the last dimension."""
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
    if not sizes or isinstance(sizes[0], torch.dtype) or sizes[-1] != logits.shape[-1]:
        return None
    return logits.of_rows(logits.x.reshape(*sizes[:-1], logits.x.shape[-1]))


def _flattened(
    logits: DeferredLogits, start_dim: int = 0, end_dim: int = -1
) -> DeferredLogits | None:
    """As rows, if the words stay a dimension of their own."""
    if end_dim % logits.dim() == logits.dim() - 1:
        return None
    return logits.of_rows(logits.x.flatten(start_dim, end_dim))


def _selected(logits: DeferredLogits, index: Any) -> DeferredLogits | None:
    """Of some samples and tokens, all words."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(part, slice) or part is Ellipsis for part in parts):
        return None
    all_words = parts[-1] in (slice(None), Ellipsis) or (
        Ellipsis not in parts and len(parts) < logits.dim()
    )
    return logits.of_rows(logits.x[parts]) if all_words else None


def _same(logits: DeferredLogits, *options: object, **named: object) -> DeferredLogits:
    return logits


REDUCTIONS: Final = ("mean", "sum")
METADATA: Final = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim")),
        *(getattr(Tensor, name).__get__ for name in ("requires_grad", "layout", "is_meta")),
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point),
    }
)
"""What of a tensor is known without its numbers."""
HANDLERS: Final[Mapping[Any, Callable[..., Any]]] = MappingProxyType(
    {
        F.cross_entropy: _loss,
        Tensor.float: partial(_widened, torch.float32),
        Tensor.double: partial(_widened, torch.float64),
        Tensor.to: _moved,
        Tensor.view: _viewed,
        Tensor.reshape: _viewed,
        Tensor.flatten: _flattened,
        Tensor.__getitem__: _selected,
        Tensor.contiguous: _same,
    }
)


def defer_logits(
    model: nn.Module, layers: Iterable[nn.Module], mode: HeadMode
) -> DeferredHead | None:
    """Let the head of a model run in a mode, in place: the last matrix behind its layers.

    A linear layer without bias. Raises InputError where there is none. None where the mode asks for
    nothing.
    """
    if mode is HeadMode.NONE:
        return None
    inside = {id(module) for layer in layers for module in layer.modules()}
    heads = [module for module in model.modules() if _is_head(module) and id(module) not in inside]
    if not heads:
        raise InputError(
            f"head {mode}: {type(model).__name__} has no linear layer without bias behind its "
            "layers. Use head none."
        )
    head = DeferredHead(mode=mode)
    heads[-1].forward = partial(_deferred, heads[-1], head)
    return head


def _is_head(module: nn.Module) -> bool:
    is_linear = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return is_linear and module.bias is None


def _deferred(module: nn.Module, head: DeferredHead, input: Tensor) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return DeferredLogits.of(input, weight, head, input.dtype)
