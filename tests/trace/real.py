"""What a layer really does on this CPU: the oracle of the exactness tests, independent of mist."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

NO_FORMULAS: Final[Mapping[object, Callable[..., int]]] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Of one layer on real tensors: bytes and FLOPs.

    `saved_bytes` is counted by the hooks of autograd; `live_bytes` is what is still alive after the
    forward pass of what it made, without its outputs: the same, unless something is kept otherwise.
    """

    saved_bytes: int
    live_bytes: int
    transient_bytes: int
    transient_with_grads_bytes: int
    transient_adding_bytes: int
    forward_flop: int
    backward_flop: int


def measure(
    model: nn.Module,
    path: str,
    batch: dict[str, torch.Tensor],
    *,
    autocast: torch.dtype | None = None,
    formulas: Mapping[object, Callable[..., int]] = NO_FORMULAS,
) -> Measured:
    """Measure the layer at `path` with the inputs that it gets in a run of the model.

    `autocast`: the precision of the forward pass. `formulas`: FLOPs of operations that torch counts
    otherwise or not at all.
    """
    mixed = partial(torch.autocast, "cpu", dtype=autocast, enabled=autocast is not None)
    layer = model.get_submodule(path)
    with mixed():
        args, kwargs = layer_inputs(model, layer, batch, grads=True)
    shared = [*model.parameters(), *model.buffers(), *_tensors((args[1:], kwargs))]
    known = {t.untyped_storage()._cdata for t in shared}
    layer.zero_grad(set_to_none=True)
    saved, live, (transient, with_grads) = _bytes(layer, args, kwargs, known, mixed)
    held = _hold_gradients(layer)
    _, _, (_, adding) = _bytes(layer, args, kwargs, known | held, mixed)
    layer.zero_grad(set_to_none=True)
    counter = partial(FlopCounterMode, display=False, custom_mapping=dict(formulas))
    with counter() as forward, mixed():
        out = _first(layer(*args, **kwargs))
    with counter() as backward:
        if out.requires_grad:
            out.sum().backward()
    return Measured(
        saved_bytes=saved,
        live_bytes=live,
        transient_bytes=transient,
        transient_with_grads_bytes=with_grads,
        transient_adding_bytes=adding,
        forward_flop=forward.get_total_flops(),
        backward_flop=backward.get_total_flops(),
    )


def convolution_gradients(
    grad: torch.Size, x: torch.Size, weight: torch.Size, *settings: object, **_: object
) -> int:
    """FLOPs of a convolution's gradients, each what its forward pass is: points times the kernel.

    Torch's own formula takes the gradient of the input as if there were one group. `settings`: the
    others of aten.convolution_backward, of which the last says which gradients are wanted.
    """
    *_, transposed, _, _, mask = settings
    assert transposed is False and isinstance(mask, list)
    points = grad.numel() // grad[1]
    return sum(mask[:2]) * 2 * points * weight.numel()


def saved_in_a_run(
    model: nn.Module, path: str, batch: dict[str, torch.Tensor], dtype: torch.dtype
) -> int:
    """Bytes that autograd saves while the layer at `path` runs, in a whole run under autocast."""
    layer, inside = model.get_submodule(path), False
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    found: dict[int, torch.Tensor] = {}

    def enter(module: nn.Module, args: object, kwargs: object) -> None:
        nonlocal inside
        inside = True
        known.update(t.untyped_storage()._cdata for t in _tensors(kwargs))
        known.update(t.untyped_storage()._cdata for t in _tensors(args)[1:])

    def leave(module: nn.Module, args: object, output: object) -> None:
        nonlocal inside
        inside = False

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if inside:
            found.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    hooks = (
        layer.register_forward_pre_hook(enter, with_kwargs=True),
        layer.register_forward_hook(leave),
    )
    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", dtype=dtype):
        out = model(**batch)
    for hook in hooks:
        hook.remove()
    del out
    return sum(t.untyped_storage().nbytes() for key, t in found.items() if key not in known)


def _first(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The activation that a layer passes on, which may be one of several outputs."""
    return output[0] if isinstance(output, tuple) else output


def layer_inputs(
    model: nn.Module, layer: nn.Module, batch: dict[str, torch.Tensor], *, grads: bool = False
) -> tuple[Any, Any]:
    """What a layer is given in a run of the model; `grads`: what has a gradient there has one."""
    seen: list[tuple[Any, Any]] = []

    def note(module: nn.Module, args: object, kwargs: object) -> None:
        seen.append(tree_map_only(torch.Tensor, _alone, (args, kwargs)))

    hook = layer.register_forward_pre_hook(note, with_kwargs=True)
    with torch.set_grad_enabled(grads):
        model(**batch)
    hook.remove()
    return seen[0]


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without what made it."""
    if not tensor.requires_grad:
        return tensor
    # No leaf: autocast would take it for a weight, whose cast it keeps.
    leaf = tensor.detach().requires_grad_()
    return leaf.view_as(leaf)


def _hold_gradients(layer: nn.Module) -> set[int]:
    """Gradients that those of a backward pass are added to; their storages."""
    trained = [p for p in layer.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    return {p.grad.untyped_storage()._cdata for p in trained if p.grad is not None}


def _bytes(
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: set[int],
    mixed: Callable[[], torch.autocast],
) -> tuple[int, int, tuple[int, int]]:
    """Bytes that forward saves and keeps alive; the most alive in backward beyond the saved.

    The latter without and with gradients of parameters.
    """
    storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return tensor

    made = Watch([], known)
    with saved_tensors_hooks(pack, lambda tensor: tensor), made, mixed():
        out = _first(layer(*args, **kwargs))
    saved = sum(size for _, size in storages.values())
    given = {args[0].untyped_storage()._cdata, out.untyped_storage()._cdata}
    live = made.alive(given) + sum(storages[key][1] for key in given & storages.keys())
    if not out.requires_grad:  # nothing but the forward pass, beside its input
        peak = args[0].untyped_storage().nbytes() + made.peak(set())
        return saved, live, (peak, peak)
    watch = Watch(list(storages.values()), known)
    done, start = Start.apply(out), torch.empty((), dtype=out.dtype)
    del out
    with watch:
        done.backward(start)
    gradients = {p.grad.untyped_storage()._cdata for p in layer.parameters() if p.grad is not None}
    return saved, live, (watch.peak(gradients) - saved, watch.peak(set()) - saved)


class _Context(FunctionCtx):
    shape: torch.Size
    kind: torch.dtype


class Start(torch.autograd.Function):
    """Hands the gradient of the output to backward without keeping it alive."""

    @staticmethod
    def forward(ctx: _Context, out: torch.Tensor) -> torch.Tensor:
        ctx.shape, ctx.kind = out.shape, out.dtype
        return out.new_empty(())

    @staticmethod
    def backward(ctx: _Context, grad: torch.Tensor) -> torch.Tensor:
        return torch.zeros(ctx.shape, dtype=ctx.kind)


class Watch(TorchDispatchMode):
    """The storages alive after every call of the backward pass."""

    def __init__(self, saved: list[tuple[StorageWeakRef, int]], known: set[int]) -> None:
        super().__init__()
        self.known = known
        self.refs = [(ref, size, ref.cdata) for ref, size in saved]
        self.moments: list[list[tuple[StorageWeakRef, int, int]]] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        watched = {key for ref, _, key in self.refs if not ref.expired()}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in watched | self.known:
                self.refs.append((StorageWeakRef(storage), storage.nbytes(), storage._cdata))
                watched.add(storage._cdata)
        self.moments.append([row for row in self.refs if not row[0].expired()])
        return out

    def alive(self, without: set[int]) -> int:
        """The bytes that are still alive, without some storages."""
        live = (row for row in self.refs if not row[0].expired())
        return sum(size for _, size, key in live if key not in without)

    def peak(self, gradients: set[int]) -> int:
        """The most bytes at any moment, without the storages that are gradients now."""
        final = {id(row) for row in self.refs if not row[0].expired() and row[2] in gradients}
        return max(sum(row[1] for row in moment if id(row) not in final) for moment in self.moments)


def _tensors(value: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
