"""Models whose parameters hold no memory but whose buffers are real.

Parameters are filled in shard by shard when every rank knows its part (`weights`); buffers (rotary
tables, masks) are small, computed by constructors, and nowhere else to be had. So constructors run
as they are, and each parameter goes to the meta device as soon as it is registered.

Plans count parameters and moments in fp32: what a model keeps in bf16 or fp16 becomes fp32 here
(`to_masters`), before anything is divided. Buffers keep their type.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mist.errors import ModelError
from mist.layers.own_checkpoints import switch_off
from mist.plans.workload import Attention
from mist.trace.models.loader import LoadedModel, load_model, local_modules
from mist.trace.models.source import PythonSource, resolve

HALF: Final = (torch.bfloat16, torch.float16)


def load(source: str, attention: Attention, images: int | None = None) -> LoadedModel:
    """The model that a plan names, in fp32, parameters on the meta device.

    Raises ModelError when the source does not give a model.
    """
    model = load_within(deferred(), source, attention, images)
    empty_parameters(model.module)
    return model


def load_within(
    where: AbstractContextManager[None],
    source: str,
    attention: Attention,
    images: int | None = None,
) -> LoadedModel:
    """The model that a plan names, in fp32, built within a context. Raises ModelError."""
    model_source = resolve(source)
    path = model_source.path if isinstance(model_source, PythonSource) else None
    with local_modules(path), where:
        model = load_model(model_source, attention=attention, images=images)
    to_masters(model.module)
    switch_off(model.module)
    return model


@contextmanager
def deferred() -> Iterator[None]:
    """Within: parameters of modules that are built hold no memory, buffers do."""
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        if value is not None and not value.is_meta:  # one that is registered again is tied
            value = nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)
        register(module, name, value)

    # A patch, as torch.device("meta") would leave buffers without values, too.
    setattr(nn.Module, "register_parameter", without_memory)  # noqa: B010 (mypy: a method)
    try:
        with _OnCpu():
            yield
    finally:
        setattr(nn.Module, "register_parameter", register)  # noqa: B010


class _OnCpu(TorchFunctionMode):
    """What is asked for on the meta device is made on the CPU: the loader asks for all of it."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401 (torch's own signature)
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        options = dict(kwargs or {})
        if options.get("device") == torch.device("meta"):
            options["device"] = torch.device("cpu")
        return func(*args, **options)


def to_masters(module: nn.Module) -> None:
    """Move parameters to the meta device, and to fp32 where they have fewer bits; ties stay.

    An update of lr 1e-5 is lost in the 8 bits of a bf16 weight.
    """
    moved: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, value in owner._parameters.items():
            if value is not None and (not value.is_meta or value.dtype in HALF):
                # By identity, so that tied names share the new parameter.
                owner._parameters[name] = moved.setdefault(id(value), _master(value))


def _master(value: nn.Parameter) -> nn.Parameter:
    dtype = torch.float32 if value.dtype in HALF else value.dtype
    return nn.Parameter(value.detach().to("meta", dtype), requires_grad=value.requires_grad)


def empty_parameters(module: nn.Module) -> None:
    """As `to_masters`. Raises ModelError for a buffer that has no values."""
    to_masters(module)
    for name, buffer in module.named_buffers():
        if buffer.is_meta:
            raise ModelError(
                f"buffer {name} of {type(module).__name__} has no values: it was built on the meta "
                "device. Build the model within mist.exec.deferred(), or on the CPU."
            )
