"""Keeps a model that is being built on the meta device, whichever device its code moves it to."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode

# Methods of tensors that do nothing but move them.
_MOVES: Final = (torch.Tensor.cuda, torch.Tensor.cpu, torch.Tensor.xpu)
_META: Final = torch.device("meta")


class StaysOnMeta(TorchFunctionMode):
    """Within: no tensor changes its device, and none is made on an accelerator.

    Scripts end with `model.to(device)` as often as not; a machine that plans needs no such device.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever torch returns
        named = dict(kwargs or {})
        first = args[0] if args else None
        if not isinstance(first, torch.Tensor):  # a new tensor: real ones may be asked for
            if "device" in named and _is_accelerator(named["device"]):
                named["device"] = _META
        elif func in _MOVES:
            return first
        else:
            if "device" in named:
                named["device"] = first.device
            if func is torch.Tensor.to and len(args) > 1:
                args = (first, _without_device(args[1], first), *args[2:])
        return func(*args, **named)


def _is_accelerator(device: object) -> bool:
    return device is not None and torch.device(device).type not in ("cpu", "meta")  # type: ignore[call-overload]


def _without_device(target: object, own: torch.Tensor) -> object:
    """What comes first in a call of `Tensor.to`: a dtype, or a device or tensor to be like."""
    if isinstance(target, torch.Tensor):
        return target.dtype
    return target if isinstance(target, torch.dtype) else own.device
