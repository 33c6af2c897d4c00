"""The names that files of weights have for the tensors of a model.

For models of transformers, names of earlier versions and a missing or additional base prefix are
mapped by its own tables, as `from_pretrained` does; other models keep their names.
"""

from collections.abc import Sequence

from torch import nn


def names_in_model(names: Sequence[str], model: nn.Module) -> dict[str, str | None]:
    """For each name in a file the name in the model; None: a part of what the model has joined."""
    known = dict(model.state_dict())
    if not hasattr(model, "base_model_prefix"):
        return {name: name for name in names}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    changes = get_model_conversion_mapping(model)
    converters = [each for each in changes if isinstance(each, WeightConverter)]
    others = [each for each in changes if not isinstance(each, WeightConverter)]
    found: dict[str, str | None] = {}
    for name in names:
        if name in known:  # it needs no change, whatever the tables say of earlier versions
            found[name] = name
            continue
        new, pattern = rename_source_key(name, others, converters, model.base_model_prefix, known)
        found[name] = new if pattern is None else None
    return found
