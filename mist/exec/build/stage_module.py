"""A pipeline stage of any model: its own forward, with the layers of other stages taken out.

The list of layers keeps its length and the layers of the stage their names. On later stages layer 0
is a stand-in that returns the received activation; other absent layers pass on their input; a
stand-in behind the last layer of the stage ends the forward pass. Code before the layers runs on
every stage (masks, rotary tables). The parameters read there, such as the embedding, exist on the
first stage only and are zeros elsewhere, which take no memory.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from mist.exec.build.loss import summed_loss
from mist.exec.build.model_structure import LayerOutput, ModelStructure, beginnings
from mist.layers import DeferredHead
from mist.layers.own_checkpoints import undone_checkpoints
from mist.trace.models.loader import LoadedModel


class _Leave(BaseException):
    """Ends the forward of a stage with its result; no `except Exception` of a model stops it."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


class _Absent(nn.Module):
    """Stands for a layer of another stage. Models read its settings (its kind of attention)."""

    def __init__(self, layer: nn.Module, output: LayerOutput) -> None:
        super().__init__()
        vars(self).update(layer=layer)  # no module of this one: its parameters are not of the stage
        self.output = output

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (torch's own signature)
        return getattr(vars(self)["layer"], name)

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.output.around(self.result(_hidden(args, kwargs)))

    def result(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


class _Exit(_Absent):
    """Stands behind the last layer of a stage."""

    def result(self, hidden: torch.Tensor) -> torch.Tensor:
        raise _Leave(hidden)


class _Entry(_Absent):
    """Stands for layer 0 on a later stage: gives what was received."""

    received: torch.Tensor

    def result(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.received


def _hidden(args: tuple[object, ...], kwargs: Mapping[str, object]) -> torch.Tensor:
    return next(x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))


class Chunk(nn.Module):
    """Consecutive layers of a model with the ends that belong to them.

    `forward(batch, received)`: the summed loss times `scale` on the last chunk, else the
    activation. `head`: how it computes the loss, where it is not the model's own way. `tally`: of
    the step so far, the summed loss and the number of what it sums.
    """

    tally: torch.Tensor

    def __init__(self, loaded: LoadedModel, scale: float, head: DeferredHead | None = None) -> None:
        super().__init__()
        self.head = head
        self.model = loaded.module
        self.loaded = loaded
        self.scale = scale
        entries = [m for m in loaded.module.modules() if isinstance(m, _Entry)]
        self.entry = entries[0] if entries else None

    def start(self, device: torch.device) -> None:
        """A step begins."""
        self.tally = torch.zeros(2, dtype=torch.float64, device=device)

    def forward(self, batch: object, received: torch.Tensor | None = None) -> torch.Tensor:
        """One micro-batch; `received`: what the chunk before passed on."""
        if self.entry is not None and received is not None:
            self.entry.received = received
        try:
            with undone_checkpoints():
                total, number = summed_loss(self.loaded, batch)
            if self.head is not None:
                self.head.refuse_unused(self.loaded.name)
            # fp64, since counts of tokens beyond 2**24 are no fp32 numbers.
            self.tally += torch.stack([total.detach().double(), number.double()])
            return total * self.scale
        except _Leave as end:
            return end.hidden
        finally:
            if self.entry is not None and received is not None:
                # Kept in the module it would live until the next micro-batch.
                del self.entry.received


def cut(
    loaded: LoadedModel, structure: ModelStructure, layers: range, dtype: torch.dtype
) -> LoadedModel:
    """A copy of a model (on the meta device) with these layers only.

    `dtype`: in which the model computes; of the zeros that stand for parameters of other stages,
    and of parameters that are not trained, of which nothing more is ever read.
    """
    # A copy on the meta device takes no memory.
    model = deepcopy(loaded.module)
    _narrow_frozen(model, dtype)
    last = len(structure.layers)
    for index, name in enumerate(structure.layers):
        if index not in layers:
            parent, _, child = name.rpartition(".")
            layer, output = model.get_submodule(name), structure.outputs[index]
            stand_in = _stand_in(index, layers)(layer, output)
            model.get_submodule(parent)._modules[child] = stand_in
    local_names = (structure.front if layers.start == 0 else frozenset[str]()) | (
        structure.tail if layers.stop == last else frozenset[str]()
    )
    ends = structure.front | structure.tail
    # What no forward pass reads belongs to the first stage, so that one stage saves it.
    unread = {name for name, _ in model.named_parameters()} - ends - _inside(model, structure)
    for name in _all_names(ends - local_names, structure) | (unread if layers.start else set()):
        _zeros(model, name, dtype)
    for name in local_names:
        _drop_other_uses(model, name, structure, layers, dtype)
    return replace(loaded, module=model)


def _narrow_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters that are not trained take this dtype, where they have one that is wider."""
    for value in model.parameters():
        wider = value.is_floating_point() and value.element_size() > dtype.itemsize
        if wider and not value.requires_grad:
            value.data = value.data.to(dtype)


def _stand_in(index: int, layers: range) -> type[_Absent]:
    if index == layers.stop:
        return _Exit
    return _Entry if index == 0 else _Absent


def _inside(model: nn.Module, structure: ModelStructure) -> set[str]:
    prefixes = beginnings(structure.layers)
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


def _all_names(names: frozenset[str], structure: ModelStructure) -> set[str]:
    """These parameters under all their names."""
    return set(names) | {again for again, first in structure.tied.items() if first in names}


def _drop_other_uses(
    model: nn.Module, name: str, structure: ModelStructure, layers: range, dtype: torch.dtype
) -> None:
    """Of a tied parameter on a stage with one end only: zeros for the other end, which is not run.

    The front of a model runs on every stage; so an embedding tied to the head of the last stage
    would gather its gradient twice.
    """
    both = name in structure.front and name in structure.tail
    if both and layers.start > 0:
        _zeros(model, name, dtype)


def _zeros(model: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Replace a parameter by zeros of its shape that take the memory of one number."""
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    value = owner._parameters.pop(child, None)
    if value is not None:
        owner.register_buffer(child, torch.zeros((), dtype=dtype).expand(value.shape), False)
