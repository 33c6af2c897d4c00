"""Traces models: what each distinct layer computes, moves and keeps, as expressions in b, s, t.

`load_graph` reads a Python file, a Hugging Face configuration or a preset; `trace_model` takes a
module. Importing this package needs neither torch nor sympy, loading a cached trace no torch.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from mist.errors import OutputError
from mist.model.summary import ModelLimits
from mist.plans.memory_levels import CONVERTS
from mist.trace import trace_cache as cache
from mist.trace.models.source import (
    ConfigSource,
    Policy,
    PythonSource,
    Source,
    TraceSetting,
    resolve,
)

if TYPE_CHECKING:
    from torch import nn

    from mist.model.graph import ModelGraph
    from mist.trace.expressions import Size

__all__ = [
    "ConfigSource",
    "Policy",
    "TraceSetting",
    "forget_trace",
    "load_graph",
    "load_listing",
    "resolve",
    "trace_digest",
    "trace_model",
]


def load_graph(
    source: str | ConfigSource,
    setting: TraceSetting,
    *,
    progress: Callable[[str], None],
    refuse: Callable[[ModelLimits], None] = lambda limits: None,
) -> "ModelGraph":
    """The graph of the model that `source` names: from the cache, or traced and then cached.

    `source`: a Python file with build_model(), a Hugging Face config.json or its folder, a preset,
    or the fields of a configuration. `progress` gets a message for each phase. `refuse` is called
    with what the model says of itself before it is traced, and may raise. Raises ModelError when
    there is no such model, TraceError when its costs cannot be traced, and InputError where its
    layers cannot be converted to the level of the setting.
    """
    from mist.trace.codec import decode_graph, encode_graph

    model_source = _source_of(source)
    key = _key(model_source, setting)
    entry = cache.load(key, setting.seq_len)
    graph = decode_graph(entry.fields) if entry is not None else None
    if graph is not None:
        progress(f"{graph.name}: trace from the cache")
        return graph
    from mist.trace.model_trace import convert_layers, limits_of, listing, trace_with_head
    from mist.trace.models.loader import load_model, local_modules

    progress(f"loading {model_source.label}")
    path = model_source.path if isinstance(model_source, PythonSource) else None
    # Modules that the file imports belong to the entry, which holds only while they are unchanged.
    with local_modules(path) as modules:
        model = load_model(
            model_source,
            precision=setting.precision,
            attention=setting.attention,
            images=setting.images,
        )
        refuse(limits_of(model))
        if setting.level in CONVERTS:
            convert_layers(model, setting.level)
        traced = trace_with_head(model, setting.head, setting, progress)
    graph, text = traced.graph, listing(traced)
    fields = encode_graph(graph)
    cache.store(cache.entry_name(key, traced.seq_len), graph.facts, fields, text, modules)
    return graph


def trace_digest(source: str | ConfigSource, setting: TraceSetting) -> str | None:
    """A digest of the cached trace of a model, or None when it is not in the cache.

    Raises ModelError when there is no such model.
    """
    entry = cache.load(_key(_source_of(source), setting), setting.seq_len)
    return entry.digest if entry is not None else None


def forget_trace(source: str | ConfigSource, setting: TraceSetting) -> None:
    """Drop the cached trace of a model, so that it is traced again. Raises ModelError."""
    entry = cache.load(_key(_source_of(source), setting), setting.seq_len)
    if entry is not None:
        cache.forget(entry.name)


def load_listing(source: str, setting: TraceSetting, *, progress: Callable[[str], None]) -> str:
    """The operations of every block of a model, one a line; traced where they are not cached.

    Raises ModelError and TraceError as `load_graph`, OutputError when nothing can be cached.
    """
    listing = _cached_listing(source, setting)
    if listing is None:
        load_graph(source, setting, progress=progress)
        listing = _cached_listing(source, setting)
    if listing is None:
        raise OutputError(
            f"the operations of {source} are kept in {cache.cache_folder()}, which cannot be "
            "written. Set XDG_CACHE_HOME to a folder that can."
        )
    return listing


def _cached_listing(source: str, setting: TraceSetting) -> str | None:
    """The listing beside an entry; an entry without one is dropped."""
    entry = cache.load(_key(resolve(source), setting), setting.seq_len)
    listing = cache.load_listing(entry.name) if entry else None
    if entry and listing is None:
        cache.forget(entry.name)
    return listing


def _source_of(source: str | ConfigSource) -> Source:
    return source if isinstance(source, ConfigSource) else resolve(source)


def _key(source: Source, setting: TraceSetting) -> str:
    return cache.cache_key(source.content, setting.words)


def trace_model(
    model: "nn.Module",
    setting: TraceSetting,
    *,
    make_batch: "Callable[[Size, Size], object] | None" = None,
    loss: Callable[..., object] | None = None,
) -> "ModelGraph":
    """The graph of a module; its tensors are only looked at for shape and dtype, on any device.

    `make_batch(batch, seq)` makes the input (default: token ids [batch, seq], int64);
    `loss(output, batch)` a mean, or the pair (sum over tokens, number of tokens) (default: the
    model's own loss, else fp32 cross-entropy of the logits [batch, seq, vocabulary] against the
    labels of the batch, or the token ids). The model's `name`, if it has one,
    names the graph. Raises TraceError when its costs cannot be traced.
    """
    from mist.trace.model_trace import trace
    from mist.trace.models.loader import LoadedModel

    name = getattr(model, "name", None)
    loaded = LoadedModel(
        module=model,
        name=name if isinstance(name, str) else type(model).__name__,
        make_batch=make_batch,
        loss=loss,
    )
    return trace(loaded, setting, lambda message: None).graph
