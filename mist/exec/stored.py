"""Weights from files: which tensor of them is which parameter, and only the part that a rank holds.

Names are those of the model's state_dict. For models of transformers, names of earlier versions and
a missing or additional base prefix are mapped by its own tables, as `from_pretrained` does. What
would have to be computed from several tensors (experts that files store one by one) is refused.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from torch import nn

from mist.errors import InputError
from mist.exec.checkpoints import saved_buffers
from mist.exec.pretrained import DTYPE_BYTES, INSTEAD, StoredTensor, some, tensors_of
from mist.trace.names import names_in_model

OWN_LOOP: Final = "Load it in a script of your own (from_pretrained, then mist.exec.parallelize)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A tensor in a file; indexing it reads what is asked for."""

    name: str
    at: StoredTensor

    def __getitem__(self, bounds: tuple[slice, ...]) -> torch.Tensor:
        """The part within the bounds of each dimension."""
        shape = [
            len(range(*b.indices(size))) for b, size in zip(bounds, self.at.shape, strict=True)
        ]
        if 0 in shape:
            return torch.empty(shape)
        with safe_open(self.at.file, framework="pt") as file:
            whole = bounds == ()  # of a single number
            part: torch.Tensor = (
                file.get_tensor(self.name) if whole else file.get_slice(self.name)[bounds]
            )
            return part


def stored_weights(folder: Path, model: nn.Module) -> dict[str, Stored]:
    """Every parameter of a model by its first name, as it lies in a folder.

    Buffers that are saved with weights are filled in at once: every rank has all of them. Raises
    InputError with the names that are missing, left over or of other shapes.
    """
    at = {name: Stored(name=name, at=tensor) for name, tensor in tensors_of(folder).items()}
    renamed = _renamed(folder, list(at), model)
    found = {renamed[name]: tensor for name, tensor in at.items()}
    buffers = dict(saved_buffers(model))
    wanted = _of_parameters(model, found) | {name: found.get(name) for name in buffers}
    _refuse_names(folder, model, found, wanted)
    there = {name: tensor for name, tensor in wanted.items() if tensor is not None}
    _refuse_tensors(folder, dict(model.named_parameters()) | buffers, there)
    for name in buffers.keys() & there.keys():
        size = buffers[name].shape
        buffers[name].copy_(there[name][tuple(map(slice, size))])
    return {name: tensor for name, tensor in there.items() if name not in buffers}


def _of_parameters(model: nn.Module, found: Mapping[str, Stored]) -> dict[str, Stored | None]:
    """What is stored for each parameter, under any of its names: tied ones are stored once."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    result: dict[str, Stored | None] = dict.fromkeys(first.values())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        result[first[id(parameter)]] = result[first[id(parameter)]] or found.get(name)
    return result


def _renamed(folder: Path, names: Sequence[str], model: nn.Module) -> dict[str, str]:
    """The name in the model of each name in the files."""
    pairs = names_in_model(names, model)
    if computed := [name for name, found in pairs.items() if found is None]:
        raise InputError(
            f"{folder} stores parts of what {type(model).__name__} has in one piece "
            f"({some(computed)}), which mist apply does not join. {OWN_LOOP}, {INSTEAD}."
        )
    return {name: found for name, found in pairs.items() if found is not None}


def _refuse_names(
    folder: Path,
    model: nn.Module,
    found: Mapping[str, Stored],
    wanted: Mapping[str, Stored | None],
) -> None:
    """Raise InputError for tensors that are not there, or that the model does not have."""
    may_lack = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    missing = [n for n, tensor in wanted.items() if tensor is None and not _matches(n, may_lack)]
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers()}
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    extra = [name for name in found if name not in known and not _matches(name, patterns)]
    if missing or extra:
        words = [f"lacks {some(missing)}"] if missing else []
        words += [f"has {some(extra)}, which the model has not"] if extra else []
        raise InputError(
            f"the weights in {folder} are not those of {type(model).__name__}: the folder "
            f"{' and '.join(words)}. Give the folder of this model with --weights, {INSTEAD}."
        )


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _refuse_tensors(
    folder: Path, wanted: Mapping[str, torch.Tensor], found: Mapping[str, Stored]
) -> None:
    """Raise InputError for tensors of other shapes, or of types that are codes, not numbers."""
    faults = []
    for name, tensor in found.items():
        shape = tuple(wanted[name].shape)
        if tensor.at.shape != shape:
            faults.append(f"{name} has shape {list(tensor.at.shape)}, the model {list(shape)}")
        elif wanted[name].is_floating_point() and tensor.at.dtype not in DTYPE_BYTES:
            faults.append(f"{name} is {tensor.at.dtype}, read are {', '.join(DTYPE_BYTES)}")
    if faults:
        raise InputError(
            f"the weights in {folder} do not fit: {some(faults)}. Give the folder of this model "
            f"with --weights, {INSTEAD}."
        )
