"""Tensors that the backward pass computes again instead of keeping them.

Of producer -> result -> consumer, the producer (a norm, an activation, a gated product) hands its
result on with a *recipe*: how to compute it from tensors that are kept anyway. A consumer that
knows recipes (a linear layer) keeps these sources in the place of the result. One that does not
know them keeps the result, as ever: a recipe is an offer, so whatever loses it (a view, a wrapper
of tensor parallelism) costs bytes, never a wrong gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from torch import Tensor
from torch.autograd import Function
from torch.utils._pytree import tree_leaves

Compute = Callable[..., Tensor]

ATTRIBUTE: Final = "_mist_recipe"


def apply_function(function: type[Function], *arguments: object) -> Tensor:
    """What an autograd function makes of its arguments."""
    result: Tensor = function.apply(*arguments)
    return result


class Rebuild:
    """The second computation of one dropped tensor, shared by the consumers that need it.

    It holds no source: these are kept by autograd, so that hooks of saved tensors see them.
    """

    __slots__ = ("_fetched", "_uses", "_value", "compute")

    def __init__(self, compute: Compute) -> None:
        self.compute = compute
        self._uses = 0
        self._fetched = 0
        self._value: Tensor | None = None

    def register(self) -> None:
        """One more consumer will ask for the tensor."""
        self._uses += 1

    def again(self, *sources: Tensor) -> Tensor:
        """The dropped tensor; it is held from the first consumer that asks to the last."""
        value = self.compute(*sources) if self._value is None else self._value
        self._fetched += 1
        # Where only some consumers go backward, the value stays until the graph is freed.
        done = self._fetched >= self._uses
        self._fetched = 0 if done else self._fetched
        self._value = None if done else value
        return value


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RebuildRecipe:
    """How to compute a tensor again: `rebuild.again(*sources)`, bit for bit."""

    rebuild: Rebuild
    sources: tuple[Tensor, ...]
    version: int


def offer(result: Tensor, compute: Compute, *sources: Tensor) -> Tensor:
    """The same tensor, with the recipe `compute(*sources)`, where there will be a backward pass."""
    if result.requires_grad:
        # Detached, sources share memory and version with the originals, but bring no graph along.
        kept = tuple(source.detach() for source in sources)
        recipe = RebuildRecipe(rebuild=Rebuild(compute), sources=kept, version=result._version)
        setattr(result, ATTRIBUTE, recipe)
    return result


def recipe_of(tensor: Tensor) -> RebuildRecipe | None:
    """The recipe that a tensor came with, unless it was changed in place since."""
    recipe: RebuildRecipe | None = getattr(tensor, ATTRIBUTE, None)
    return recipe if recipe is not None and recipe.version == tensor._version else None


def end_recipes(module: object, args: object, output: object) -> None:
    """Forward hook of a layer: what leaves it is kept by the layer that takes it.

    So the bytes of a layer depend on this layer alone, and checkpointing or offloading one keeps
    nothing of another alive.
    """
    for leaf in tree_leaves(output):
        if getattr(leaf, ATTRIBUTE, None) is not None:
            delattr(leaf, ATTRIBUTE)
