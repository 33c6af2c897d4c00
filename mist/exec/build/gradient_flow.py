"""Where gradients flow in a model of which only some parameters are trained.

A gradient goes back through a layer if something in it, in a layer before it, or in what is read
before the layers is trained. The layers before all that have no backward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mist.exec.build.model_structure import ModelStructure
from mist.trace.models.loader import LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Flows:
    """Of a chunk of layers: whether its input has a gradient, and its output (the loss always has).

    `idle`: how many of its layers, the first ones, have no backward pass.
    """

    before: bool
    behind: bool
    idle: int


def flows_of(loaded: LoadedModel, structure: ModelStructure, layers: range) -> Flows:
    """Where gradients flow around and in consecutive layers of a model."""
    trained = _trained(loaded, structure)
    # trained[0] is of what is read before the layers: layer i has entry i + 1.
    back = [any(trained[: index + 2]) for index in layers]
    return Flows(
        before=layers.start > 0 and any(trained[: layers.start + 1]),
        behind=layers.stop == len(structure.layers) or any(trained[: layers.stop + 1]),
        idle=back.count(False),
    )


def _trained(loaded: LoadedModel, structure: ModelStructure) -> Sequence[bool]:
    """Whether anything is trained of what is read before the layers, and of each layer."""
    front = any(loaded.module.get_parameter(name).requires_grad for name in structure.front)
    modules = (loaded.module.get_submodule(name) for name in structure.layers)
    return [front, *(any(p.requires_grad for p in module.parameters()) for module in modules)]
