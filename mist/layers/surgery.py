"""`convert`: puts a rung of the memory ladder into a model, in place.

    import mist.layers
    mist.layers.convert(model, "drop-norm")

Forwards are replaced, modules are not: parameters, names, hooks, types and the state dict stay.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, Final, get_args

from torch import Tensor, nn

from mist.errors import InputError, did_you_mean
from mist.layers import dropout_attention
from mist.layers.activation_functions import activate, gains
from mist.layers.graph_rewriting import rewrite
from mist.layers.linears import drops_input, linear_of_dropped
from mist.layers.masks import Masks, dropout
from mist.layers.norms import RUNG_WORDS, NormOp
from mist.layers.recipes import end_recipes
from mist.layers.recognition import (
    activation_of,
    matrix_of_weight,
    norm_of,
    parameter_names,
    replaced,
)
from mist.layers.rungs import RUNGS, Rung

LINEAR: Final = "linear, keeps what a dropped input is made of"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleChange:
    """One module whose forward was replaced, and what it is now."""

    path: str
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftAlone:
    """One module that stays as it was although it looks like one that has a rung, and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What `convert` did to a model."""

    level: str
    changes: tuple[ModuleChange, ...]
    left_alone: tuple[LeftAlone, ...]


@dataclass(slots=True, kw_only=True)
class _Surgery:
    rung: Rung
    masks: Masks
    changes: list[ModuleChange] = field(default_factory=list)
    linears: list[ModuleChange] = field(default_factory=list)
    left_alone: list[LeftAlone] = field(default_factory=list)

    def change(self, path: str, what: str) -> None:
        self.changes.append(ModuleChange(path=path, what=what))

    def leave(self, path: str, reason: str) -> None:
        self.left_alone.append(LeftAlone(path=path, reason=reason))


def convert(model: nn.Module, level: str, *, masks: Masks = "byte") -> Conversion:
    """Give every layer of a model a memory level, in place; on any device, with or without data.

    `level`: a row of `mist.layers.rungs`. `masks`: what dropout keeps of an element, a byte or a
    bit. What is not recognised stays as it was, and the result says why. Raises InputError for an
    unknown level, a model that was converted before, and one with nothing to convert.
    """
    if level not in RUNGS:
        raise InputError(f"level {level!r} is unknown. {did_you_mean(level, RUNGS)}")
    if masks not in get_args(Masks):
        raise InputError(f"masks {masks!r} are unknown. Known: {', '.join(get_args(Masks))}.")
    if any(getattr(module, "_mist_level", None) for module in model.modules()):
        raise InputError("this model was converted before. Convert a new one, with one level.")
    surgery = _Surgery(rung=RUNGS[level], masks=masks)
    activations: dict[str, str] = {}
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if not list(module.children()):
            name = _leaf(surgery, path, module)
            activations |= {path: name} if name else {}
    for path, module in modules.items():
        if list(module.children()):
            _inner(surgery, path, module, activations)
    if not surgery.changes:
        raise InputError(
            f"level {level}: nothing in {type(model).__name__} was recognised: no norm, no "
            "activation with a slope, no dropout."
        )
    model._mist_level = level  # type: ignore[assignment]
    return Conversion(
        level=level,
        changes=(*surgery.changes, *surgery.linears),
        left_alone=tuple(surgery.left_alone),
    )


def convert_layer(layer: nn.Module, level: str) -> Conversion:
    """`convert` one layer of a model, whose neighbours may have another level, or none.

    What leaves it is kept by the layer behind it, as in a model that is converted whole. Raises
    InputError as `convert` does.
    """
    converted = convert(layer, level)
    layer.register_forward_hook(end_recipes)
    return converted


def _leaf(surgery: _Surgery, path: str, module: nn.Module) -> str | None:
    """Convert a module without children; returns the name of the activation that it is, if any."""
    if replaced(module):
        surgery.leave(path, "its forward was replaced by somebody else")
        return None
    if isinstance(module, nn.Dropout):
        _dropout(surgery, path, module)
    elif known := norm_of(module):
        op = NormOp(form=known.form, eps=known.eps, rung=surgery.rung.norms)
        _replace(module, _norm_forward(op))
        surgery.change(path, f"{known.name}, {RUNG_WORDS[surgery.rung.norms]}")
    elif matrix := matrix_of_weight(module):
        if surgery.rung.linears:
            _replace(module, _linear_forward(type(module).forward, matrix.flipped))
            surgery.linears.append(ModuleChange(path=path, what=LINEAR))
    elif name := activation_of(module):
        _activation(surgery, path, module, name)
        return name
    elif reason := _reason(module):
        surgery.leave(path, reason)
    return None


def _reason(module: nn.Module) -> str | None:
    """Why a module without children that looks like one with a rung has none."""
    kind = type(module).__name__
    if any("norm" in each.__name__.lower() for each in type(module).__mro__):
        return f"{kind} computes none of the norms that are known"
    if not list(module.parameters()) and type(module).__module__.endswith("activation"):
        return f"{kind} is none of the activations that are known"
    if not isinstance(module, nn.Embedding) and any(
        p.dim() == 2 and n == "weight" for n, p in module.named_parameters()
    ):
        return f"{kind} has a matrix, but does not compute input times weight"
    return _experts(module)


def _experts(module: nn.Module) -> str | None:
    """Why a module that holds the matrices of several experts in one parameter stays."""
    # Of [experts, in, out]; tables of positions are [1, tokens, width].
    several = any(p.dim() == 3 and p.shape[0] > 1 for p in module.parameters(recurse=False))
    several = several and not isinstance(module, nn.Conv1d)
    return f"{type(module).__name__} has several matrices in one parameter" if several else None


def _dropout(surgery: _Surgery, path: str, module: nn.Dropout) -> None:
    if type(module) is not nn.Dropout or module.inplace:
        surgery.leave(path, f"{type(module).__name__} is not plain dropout")
        return
    _replace(module, _dropout_forward(surgery.masks))
    if module.p > 0:
        surgery.change(path, f"dropout, keeps a {surgery.masks} an element")


def _activation(surgery: _Surgery, path: str, module: nn.Module, name: str) -> None:
    rung = surgery.rung.activations
    if not gains(name, rung):
        return
    _replace(module, _activation_forward(name, surgery))
    surgery.change(path, f"{name}, {RUNG_WORDS[rung]}")


def _inner(surgery: _Surgery, path: str, module: nn.Module, activations: dict[str, str]) -> None:
    """What is written out in a module with children; and where layers end."""
    if isinstance(module, nn.MultiheadAttention):
        surgery.leave(path, "MultiheadAttention runs as one function")
    if reason := _experts(module):
        surgery.leave(path, reason)
    _written_out(surgery, path, module, activations)
    if surgery.rung.attention:
        _attention(surgery, path, module)
    if isinstance(module, nn.ModuleList | nn.Sequential):
        for layer in module.children():
            # A layer, not a step of one: what leaves it is kept by the next.
            if list(layer.children()):
                layer.register_forward_hook(end_recipes)


def _written_out(
    surgery: _Surgery, path: str, module: nn.Module, activations: dict[str, str]
) -> None:
    """Products and functions in the forward of a module around matrices."""
    if replaced(module) or not any(parameter_names(child) for child in module.children()):
        return
    paths = {name: f"{path}.{name}".lstrip(".") for name, _ in module.named_children()}
    children = {name: activations[full] for name, full in paths.items() if full in activations}
    for words in rewrite(module, children, surgery.rung.activations, surgery.masks):
        surgery.change(path, words)


def _attention(surgery: _Surgery, path: str, module: nn.Module) -> None:
    """Attention of transformers that is written out, by the name that its configuration gives."""
    config = getattr(module, "config", None)
    is_attention = hasattr(module, "scaling") and hasattr(module, "is_causal")
    if not is_attention or getattr(config, "_attn_implementation", None) != "eager":
        return
    if _differs(module, config):
        surgery.leave(path, f"{type(module).__name__} does more with its scores than softmax")
        return
    # A copy for this module alone: the model's own decides about masks.
    alone: Any = copy(config)
    alone._attn_implementation = dropout_attention.implementation(surgery.masks)
    module.config = alone
    surgery.change(path, "attention written out, makes dropped-out probabilities again")


def _differs(module: nn.Module, config: object) -> bool:
    """Caps on scores, sinks, another order of steps."""
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    reordered = bool(getattr(module, "reorder_and_upcast_attn", False))
    return capped or reordered or hasattr(module, "sinks")


def _replace(module: nn.Module, forward: Callable[..., Tensor]) -> None:
    """Bound to the module, so that a deep copy of it calls its own."""
    module.forward = MethodType(forward, module)


def _norm_forward(op: NormOp) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        return op(x, self._parameters.get("weight"), self._parameters.get("bias"))

    return forward


def _linear_forward(plain: Callable[..., Tensor], flipped: bool) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        if not drops_input(x, self.weight):
            return plain(self, x)
        return linear_of_dropped(x, self.weight, self.bias, flipped=flipped)

    return forward


def _activation_forward(name: str, surgery: _Surgery) -> Callable[..., Tensor]:
    rung, masks = surgery.rung.activations, surgery.masks

    def forward(self: object, x: Tensor) -> Tensor:
        return activate(x, name, rung, masks)

    return forward


def _dropout_forward(masks: Masks) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        return dropout(x, self.p, masks) if self.training and self.p > 0 else x

    return forward
