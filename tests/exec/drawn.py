"""All of what modules are given at first, as tests compare it."""

from collections.abc import Mapping

import torch
from torch import nn

from mist.exec.build.weight_init import initial_values


def whole_values(model: nn.Module, module_name: str, seed: int) -> Mapping[str, torch.Tensor]:
    """The initial values of a module's own parameters, whole, by their names in it."""
    shapes = dict(model.get_submodule(module_name).named_parameters(recurse=False))
    values = initial_values(model, module_name, seed, torch.device("cpu"))
    return {
        name: value[tuple(slice(0, size) for size in shapes[name].shape)]
        for name, value in values.items()
    }
