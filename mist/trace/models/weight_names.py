"""How the tensors in files of weights become those of a model.

For models of transformers its own tables say so, as in `from_pretrained`: names of earlier
versions, a missing or additional base prefix, and tensors that files keep in pieces (experts one by
one, which the model has stacked). Other models keep their names.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightConverter


@dataclass(kw_only=True, eq=False)
class Recipe:
    """Tensors of a model that are made of several of a file.

    `pieces`: names in the file, each with the pattern that it is known by; `target`: what the table
    calls the result.
    """

    target: str
    converter: "WeightConverter"
    model: nn.Module
    pieces: list[tuple[str, str]] = field(default_factory=list)

    def make(self, read: Callable[[str], torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The tensors, by their names in the model, of what `read` gives for names in the file."""
        work = deepcopy(self.converter)
        for name, pattern in self.pieces:
            work.add_tensor(self.target, name, pattern, read(name))
        tensors = work.convert(self.target, model=self.model, config=self.model.config)
        return {name: each[0] if isinstance(each, list) else each for name, each in tensors.items()}


def names_in_model(
    names: Sequence[str], model: nn.Module
) -> tuple[dict[str, str], tuple[Recipe, ...]]:
    """The name in the model of each name in a file, and recipes for those that are pieces."""
    if not hasattr(model, "base_model_prefix"):
        return {name: name for name in names}, ()
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        dot_natural_key,
        rename_source_key,
    )

    known, prefix = dict(model.state_dict()), model.base_model_prefix
    changes = get_model_conversion_mapping(model)
    converters = [each for each in changes if isinstance(each, WeightConverter)]
    others = [each for each in changes if not isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    renamed: dict[str, str] = {}
    recipes: dict[str, Recipe] = {}
    for name in sorted(names, key=dot_natural_key):  # pieces are stacked in this order
        if name in known:  # it needs no change, whatever the tables say of earlier versions
            renamed[name] = name
            continue
        new, pattern = rename_source_key(name, others, converters, prefix, known)
        if pattern is None or new not in known:
            renamed[name] = new if pattern is None else name
            continue
        recipe = Recipe(target=new, converter=by_pattern[pattern], model=model)
        recipes.setdefault(new, recipe).pieces.append((name, pattern))
    return renamed, tuple(recipes.values())
