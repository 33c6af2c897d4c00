"""Undoes what a model's own code checkpoints: which layers recompute is what a plan decides.

`torch.utils.checkpoint.checkpoint` under whichever name the model imported it, in both its forms.
Functions that `PlannedCheckpoint` wraps, which a plan checkpoints, stay as they are. Models of
transformers have a switch, too: on, they also do other things (offload, gradients of masks).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from unittest.mock import patch

from torch import nn
from torch.utils import checkpoint as torch_checkpoint

SWITCH: Final = "gradient_checkpointing"  # an attribute of modules of transformers


@dataclass(frozen=True, slots=True)
class PlannedCheckpoint:
    """A function that a plan checkpoints: run again, it must save what it did at first."""

    function: Callable[..., object]

    def __call__(self, *args: object, **kwargs: object) -> object:
        with undone_checkpoints():
            return self.function(*args, **kwargs)


@contextmanager
def undone_checkpoints() -> Iterator[list[object]]:
    """Within: the model's own checkpoints only call their functions, which are listed."""
    functions: list[object] = []
    keep = torch_checkpoint._checkpoint_without_reentrant_generator

    def around(function: object, *args: Any, **kwargs: Any) -> Iterator[None]:
        if isinstance(function, PlannedCheckpoint):
            yield from keep(function, *args, **kwargs)
        else:
            functions.append(function)
            yield  # here checkpoint() calls the function

    class _Called:
        """In the place of the autograd function of the reentrant form."""

        @staticmethod
        def apply(function: Callable[..., object], preserve: bool, *args: object) -> object:
            functions.append(function)
            return function(*args)

    # Both are looked up when checkpoint() is called.
    with (
        patch.object(torch_checkpoint, "_checkpoint_without_reentrant_generator", around),
        patch.object(torch_checkpoint, "CheckpointFunction", _Called),
    ):
        yield functions


def own_checkpoints(model: nn.Module) -> list[nn.Module]:
    """The modules of transformers whose switch is on."""
    return [each for each in model.modules() if getattr(each, SWITCH, False) is True]


def switch_off(model: nn.Module) -> None:
    """Switch off what transformers checkpoints."""
    for each in own_checkpoints(model):
        setattr(each, SWITCH, False)


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The same within: afterwards it is on again."""
    found = own_checkpoints(model)
    switch_off(model)
    try:
        yield
    finally:
        for each in found:
            setattr(each, SWITCH, True)
