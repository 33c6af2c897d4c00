"""What the traced model runs on: a GPU's kernels imitated on fake CPU tensors, or this CPU.

Fake CPU tensors follow the CPU's rules: attention, dropout and norms save other tensors than on a
GPU. Policy "cuda" sends the three composite functions to the operations that a GPU build chooses,
and gives norm statistics the dtype that CUDA kernels write. Policy "cpu" changes nothing.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final, cast
from unittest.mock import patch

import torch
from torch import nn
from torch._ops import OpOverload
from torch.library import Library
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mist.plans.workload import Attention
from mist.trace.diagnose import without_log
from mist.trace.models.source import Policy, TraceSetting
from mist.trace.operations import attention
from mist.trace.operations.autocast import in_fp32
from mist.trace.operations.equal_images import MASK_ARGUMENTS, MASKING
from mist.trace.operations.flex_attention import flex_as_flash
from mist.trace.operations.kernels import (
    OPAQUE,
    SYMBOLIC,
    fused_rms_norm,
    fused_rms_norm_backward,
)
from mist.trace.operations.known_scans import scans_as_kernels
from mist.trace.operations.known_values import KnownValues
from mist.trace.operations.message_passing import edges_as_given
from mist.trace.operations.recurrent import RECURRENT
from mist.trace.operations.resampling import INTERPOLATION
from mist.trace.operations.symbolic_sizes import symbolic_sizes
from mist.trace.operations.windows import Windows, windowed_masks

aten = torch.ops.aten
OnCall = Callable[..., object]
WRITTEN_NORMS: Final = ("RMSNorm", "T5LayerNorm")
STATISTICS_IN_FP32: Final = frozenset({aten.native_layer_norm, aten.native_batch_norm})


class Functions(TorchFunctionMode):
    """Calls of some torch functions go to a replacement, however the model imported them."""

    def __init__(self, replacements: Mapping[object, Callable[..., object]]) -> None:
        super().__init__()
        self._replacements = replacements

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        return self._replacements.get(func, func)(*args, **(kwargs or {}))


class ImitatedKernels(TorchDispatchMode):
    """Single operations: norm statistics as CUDA writes them; symbolic sizes where C++ has none."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._policy = policy
        self.known = KnownValues()

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        answer = self.known.answer(func, args)
        if answer is not None:
            return answer
        stand_ins: Mapping[Any, Callable[..., Any]] = OPAQUE if _traced_ahead() else SYMBOLIC
        kernel = stand_ins.get(func.overloadpacket, func)
        out = kernel(*args, **(kwargs or {}))
        self.known.note(func, args, out)
        if self._policy == "cuda" and func.overloadpacket in STATISTICS_IN_FP32:
            first, *statistics = out
            return first, *(each.float() for each in statistics)
        return out


def _traced_ahead() -> bool:
    """Whether calls go into a graph (see `compiled`)."""
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) for key in (keys.FUNCTIONAL, keys.PROXY))


def _first(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return outputs[0]


def _dropout(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    return _first(torch.native_dropout(input, p, train)) if train and p > 0 else input


def _rms_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    if _traced_ahead():  # Inductor makes its own kernel of the parts
        parts = aten.rms_norm.default.decompose(input, normalized_shape, weight, eps)
        return cast(torch.Tensor, parts)
    return _first(fused_rms_norm(input, weight, len(normalized_shape)))


def _norm_of_layers(
    x: torch.Tensor, scale: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `mist.layers` runs on a GPU."""
    return cast(tuple[torch.Tensor, torch.Tensor], fused_rms_norm(x, scale, 1))


def _norm_gradients_of_layers(
    grad: torch.Tensor,
    x: torch.Tensor,
    rstd: torch.Tensor,
    scale: torch.Tensor | None,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    found = fused_rms_norm_backward(grad, x, rstd, scale)
    return cast(tuple[torch.Tensor, torch.Tensor], found)


# Under fake tensors transformers cannot look at position_ids and builds a [b, 1, s, s] mask for
# packed sequences, which a real run does not have.
PACKED_CHECK: Final = "find_packed_sequence_indices"
# Nor can it see that a mask of padding, which many models make of ones where they are given none,
# masks nothing; with real tensors it looks, and leaves such a mask out (`_without_ones`).


@contextmanager
def runs_as(setting: TraceSetting, modules: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Within: functions and kernels behave as on the setting's device, scans of modules, too."""
    with ExitStack() as stack:
        stack.enter_context(without_log("transformers"))
        stack.enter_context(symbolic_sizes())
        stack.enter_context(edges_as_given())
        kernels = stack.enter_context(ImitatedKernels(setting.policy))
        if (masking := sys.modules.get(MASKING)) is not None:
            stack.enter_context(patch.object(masking, PACKED_CHECK, _not_packed))
            arguments = partial(_without_ones, kernels, getattr(masking, MASK_ARGUMENTS))
            stack.enter_context(patch.object(masking, MASK_ARGUMENTS, arguments))
        if setting.autocast and setting.policy == "cuda":
            stack.enter_context(Functions(in_fp32()))
        # With attention written out no kernel skips what a mask hides.
        is_fused = setting.policy == "cuda" and setting.attention is Attention.FLASH
        windows = stack.enter_context(windowed_masks()) if is_fused else Windows()
        if setting.policy == "cuda":
            modules = list(modules)
            stack.enter_context(scans_as_kernels(modules))
            stack.enter_context(flex_as_flash(modules, windows))
        stack.enter_context(_composed(_kernels_of(setting, windows)))
        yield


@contextmanager
def runs_anywhere(model: nn.Module) -> Iterator[None]:
    """Within: a model runs on fake tensors, though only a GPU has kernels for all it calls.

    For what takes what from which; costs are those of `runs_as`.
    """
    modules = list(model.modules())
    scans, flex = scans_as_kernels(modules), flex_as_flash(modules, Windows())
    with ImitatedKernels("cpu"), edges_as_given(), scans, flex:
        yield


@contextmanager
def _composed(kernels: Mapping[str, Callable[..., object]]) -> Iterator[None]:
    """Within: these composite operations run by other kernels, whoever calls them."""
    libraries = {name: Library(name, "IMPL") for name in ("aten", "mist")}
    for name, kernel in kernels.items():
        # At the dispatch key that fake CPU tensors have with gradients, so that calls from C++ come
        # by here, too.
        libraries[name.partition("::")[0]].impl(name, kernel, "AutogradCPU")
    try:
        yield
    finally:
        for library in libraries.values():
            library._destroy()


def _kernels_of(setting: TraceSetting, windows: Windows) -> dict[str, Callable[..., object]]:
    kernels: dict[str, Callable[..., object]] = {**INTERPOLATION}
    if setting.policy == "cuda":
        kernels |= {
            **RECURRENT,
            "aten::dropout": _dropout,
            "aten::rms_norm": _rms_norm,
            "mist::rms_norm": _norm_of_layers,
            "mist::rms_norm_gradients": _norm_gradients_of_layers,
            "aten::scaled_dot_product_attention": partial(attention.fused, windows),
        }
    if setting.attention is Attention.MATH:
        kernels |= {"aten::scaled_dot_product_attention": attention.math}
    return kernels


def fused_norms(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, OnCall]]:
    """The RMS norms that are written out in several operations, and a kernel to stand in."""
    for module in modules:
        name, weight = type(module).__name__, getattr(module, "weight", None)
        written = name.endswith(WRITTEN_NORMS) and not isinstance(module, nn.RMSNorm)
        if written and isinstance(weight, torch.Tensor) and weight.dim() == 1:
            yield module, partial(_fused_norm, module)


def _fused_norm(
    norm: nn.Module, forward: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor:
    (x,) = (*args, *kwargs.values())
    return _first(fused_rms_norm(x, norm.weight, 1))


def _without_ones(
    kernels: ImitatedKernels,
    mask_arguments: Callable[..., object],
    config: object,
    embeds: torch.Tensor,
    mask: torch.Tensor | None,
    *others: object,
) -> object:
    plain = None if kernels.known.are_ones(mask) else mask
    return mask_arguments(config, embeds, plain, *others)


def _not_packed(position_ids: torch.Tensor) -> None:
    return None
