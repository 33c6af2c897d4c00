"""`mist convert MODEL --level L`: what a memory level would change in a model."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from mist.errors import InputError
from mist.plans.workload import Attention, MemoryLevel
from mist.trace.models.source import PythonSource, resolve

if TYPE_CHECKING:
    from mist.layers import Conversion
    from mist.layers.masks import Masks


def conversion_of(
    model: str, level: str, masks: "Masks", attention: Attention, progress: Callable[[str], None]
) -> "Conversion":
    """Convert the model of a source on the meta device, and say what was done.

    Raises ModelError when there is no such model, InputError when it cannot be converted.
    """
    from mist.layers import RUNGS, convert
    from mist.trace.models.loader import load_model, local_modules

    if level in set(MemoryLevel) - RUNGS.keys():
        raise InputError(
            f"level {level} converts no layer: it is how layers run again. `mist check {model} "
            f"--checkpoint {level}` judges it, `mist plan --set checkpoint={level}` plans with it."
        )
    source = resolve(model)
    progress(f"loading {source.label}")
    path = source.path if isinstance(source, PythonSource) else None
    with local_modules(path):
        loaded = load_model(source, attention=attention)
        return convert(loaded.module, level, masks=masks)
