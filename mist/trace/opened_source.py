"""A source of a model whose model is loaded once for several traces, when the first needs it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mist.trace.models.source import PythonSource, Source, TraceSetting

if TYPE_CHECKING:
    from mist.trace.model_trace import Traced
    from mist.trace.models.loader import LoadedModel


@dataclass(slots=True, kw_only=True)
class OpenedSource:
    """What is known of a source in this process.

    `model`: as it was loaded; `files`: the local modules that it imported so far; `traced`: its
    trace as it is, if it was made here.
    """

    source: Source
    model: "LoadedModel | None" = None
    traced: "Traced | None" = None
    files: set[Path] = field(default_factory=set)

    @contextmanager
    def running(
        self, setting: TraceSetting, progress: Callable[[str], None]
    ) -> "Iterator[LoadedModel]":
        """Within: the model, and the modules in the folder of its file. Raises ModelError."""
        from mist.trace.models.loader import load_model, local_modules

        source = self.source
        path = source.path if isinstance(source, PythonSource) else None
        # Modules that the file imports belong to an entry, which holds while they are unchanged.
        with local_modules(path) as files:
            if self.model is None:
                progress(f"loading {source.label}")
                self.model = load_model(
                    source,
                    attention=setting.attention,
                    images=setting.images,
                )
            yield self.model
        self.files.update(files)
