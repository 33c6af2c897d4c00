"""Weights from files: which tensor of them is which parameter, and only the part that a rank holds.

Names are those of the model's state_dict, or become them as `mist.trace.models.weight_names` says.
What has to be made of several tensors (experts that files store one by one) is read whole, a
parameter at a time.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from mist.errors import InputError
from mist.exec.build.pretrained import DTYPE_BYTES, INSTEAD, StoredTensor, some, tensors_of
from mist.exec.run.checkpoints import saved_buffers
from mist.trace.models.weight_names import Recipe, names_in_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A tensor in a file; indexing it reads what is asked for."""

    name: str
    at: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all of it."""
        return self.at.shape

    @property
    def dtypes(self) -> set[str]:
        """What it is stored in."""
        return {self.at.dtype}

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


@dataclass(frozen=True, slots=True, kw_only=True)
class ComposedTensor:
    """A tensor that is made of several in files, all of which are read for any part of it."""

    name: str
    recipe: Recipe
    pieces: Mapping[str, Stored]
    shape: tuple[int, ...]

    @property
    def dtypes(self) -> set[str]:
        """What the pieces are stored in."""
        return {dtype for piece in self.pieces.values() for dtype in piece.dtypes}

    def __getitem__(self, bounds: tuple[slice, ...]) -> torch.Tensor:
        """The part within the bounds of each dimension."""
        tensors = self.recipe.make(lambda name: _whole(self.pieces[name]))
        return tensors[self.name][bounds]


Tensor = Stored | ComposedTensor


def stored_weights(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """Every parameter of a model by its first name, as it lies in a folder.

    Buffers that are saved with weights are filled in at once: every rank has all of them. Raises
    InputError with the names that are missing, left over or of other shapes.
    """
    tensors = _by_name_in_model(folder, model)
    buffers = dict(saved_buffers(model))
    expected = _of_parameters(model, tensors) | {name: tensors.get(name) for name in buffers}
    _refuse_names(folder, model, tensors, expected)
    present = {name: tensor for name, tensor in expected.items() if tensor is not None}
    _refuse_tensors(folder, dict(model.named_parameters()) | buffers, present)
    # Buffers are not sharded, so they need no place among what ranks read in part.
    for name in buffers.keys() & present.keys():
        buffers[name].copy_(_whole(present[name]))
    return {name: tensor for name, tensor in present.items() if name not in buffers}


def _whole(tensor: Tensor) -> torch.Tensor:
    return tensor[tuple(map(slice, tensor.shape))]


def _by_name_in_model(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    at = {name: Stored(name=name, at=tensor) for name, tensor in tensors_of(folder).items()}
    renamed, recipes = names_in_model(list(at), model)
    by_name: dict[str, Tensor] = {new: at[name] for name, new in renamed.items()}
    for recipe in recipes:
        pieces = {name: at[name] for name, _ in recipe.pieces}
        try:
            tensors = recipe.make(lambda name: torch.empty(at[name].shape, device="meta"))
        except Exception as error:  # transformers raises what its operations raise
            raise InputError(
                f"{folder}: {recipe.target} cannot be made of {some(list(pieces))}: {error}. "
                f"Download the folder again, {INSTEAD}."
            ) from error
        for name, value in tensors.items():
            shape = tuple(value.shape)
            by_name[name] = ComposedTensor(name=name, recipe=recipe, pieces=pieces, shape=shape)
    return by_name


def _of_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """What is stored for each parameter, under any of its names: tied ones are stored once."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    result: dict[str, Tensor | None] = dict.fromkeys(first.values())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        result[first[id(parameter)]] = result[first[id(parameter)]] or tensors.get(name)
    return result


def _refuse_names(
    folder: Path,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor | None],
) -> None:
    """Raise InputError for tensors that are not there, or that the model does not have."""
    missing = _significant(
        [name for name, tensor in expected.items() if tensor is None], model, "missing"
    )
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers()}
    extra = _significant(tensors.keys() - known, model, "unexpected")
    lacks = f"lacks {some(missing)}" if missing else ""
    has = f"has {some(extra)}, which the model has not" if extra else ""
    if lacks or has:
        raise InputError(
            f"the weights in {folder} are not those of {type(model).__name__}: the folder "
            f"{' and '.join(filter(None, (lacks, has)))}. Give the folder of this model with "
            f"--weights, {INSTEAD}."
        )


def _significant(names: Collection[str], model: nn.Module, kind: str) -> list[str]:
    """Names without those that the model's class in transformers says do not matter."""
    patterns = getattr(model, f"_keys_to_ignore_on_load_{kind}", None) or ()
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]


def _refuse_tensors(
    folder: Path, expected: Mapping[str, torch.Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Raise InputError for tensors of other shapes, or of types that are codes, not numbers."""
    faults = []
    for name, tensor in tensors.items():
        shape = tuple(expected[name].shape)
        if tensor.shape != shape:
            faults.append(f"{name} has shape {list(tensor.shape)}, the model {list(shape)}")
        elif expected[name].is_floating_point() and (codes := tensor.dtypes - DTYPE_BYTES.keys()):
            faults.append(
                f"{name} is {', '.join(sorted(codes))}, read are {', '.join(DTYPE_BYTES)}"
            )
    if faults:
        raise InputError(
            f"the weights in {folder} do not fit: {some(faults)}. Give the folder of this model "
            f"with --weights, {INSTEAD}."
        )
