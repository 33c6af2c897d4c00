"""`mist convert MODEL --level L`: what a memory level would change in a model."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from mist.plans.workload import Attention, Precision
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
    from mist.layers import convert
    from mist.trace.models.loader import load_model, local_modules

    source = resolve(model)
    progress(f"loading {source.label}")
    path = source.path if isinstance(source, PythonSource) else None
    with local_modules(path):
        loaded = load_model(source, precision=Precision.BF16, attention=attention)
        return convert(loaded.module, level, masks=masks)
