"""Traces models: what each distinct layer computes, moves and keeps, as expressions in b, s, t.

`load_graph` reads a Python file, a Hugging Face configuration or a preset; `trace_model` takes a
module. Importing this package needs neither torch nor sympy, loading a cached trace no torch.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from mist.errors import OutputError
from mist.model.summary import ModelLimits
from mist.plans.workload import HeadMode, MemoryLevel
from mist.trace import trace_cache as cache
from mist.trace.models.source import (
    ConfigSource,
    Policy,
    Source,
    TraceSetting,
    resolve,
)
from mist.trace.opened_source import OpenedSource

if TYPE_CHECKING:
    from torch import nn

    from mist.model.graph import ModelGraph
    from mist.trace.expressions import Size
    from mist.trace.model_trace import Traced

__all__ = [
    "ConfigSource",
    "OpenedSource",
    "Policy",
    "TraceSetting",
    "forget_trace",
    "load_graph",
    "load_levels",
    "load_listing",
    "opened",
    "resolve",
    "trace_digest",
    "trace_model",
]


def opened(source: str | ConfigSource) -> OpenedSource:
    """A source that several traces are made of. Raises ModelError when there is no such model."""
    return OpenedSource(source=_source_of(source))


def load_graph(
    source: str | ConfigSource | OpenedSource,
    setting: TraceSetting,
    *,
    progress: Callable[[str], None],
    refuse: Callable[[ModelLimits], None] = lambda limits: None,
) -> "ModelGraph":
    """The graph of the model that `source` names: from the cache, or traced and then cached.

    `source`: a Python file with build_model(), a Hugging Face config.json or its folder, a preset,
    or the fields of a configuration. `progress` gets a message for each phase. `refuse` is called
    with what the model says of itself before it is traced (in the cache: what its graph says), and
    may raise. Raises ModelError when there is no such model, TraceError when its costs cannot be
    traced, and InputError where its head cannot run as the setting says.
    """
    known = source if isinstance(source, OpenedSource) else opened(source)
    if (graph := _cached(known, setting)) is not None:
        progress(f"{graph.name}: trace from the cache")
        refuse(graph.limits)
        return graph
    from mist.trace.model_trace import limits_of, trace_with_head

    if setting.head is not HeadMode.NONE:
        known = OpenedSource(source=known.source)  # the head is put into a model of its own
    with known.running(setting, progress) as model:
        refuse(limits_of(model))
        traced = trace_with_head(model, setting.head, setting, progress)
    known.traced = traced
    _store(known, setting, traced)
    return traced.graph


def load_levels(
    source: OpenedSource,
    setting: TraceSetting,
    levels: Iterable[MemoryLevel],
    plain: "ModelGraph",
    *,
    progress: Callable[[str], None],
) -> "dict[MemoryLevel, ModelGraph]":
    """The graph of a model at levels that convert its layers: cached, or traced and then cached.

    `plain`: its graph as it is. What the model cannot have is left out, and `progress` hears why.
    Raises ModelError.
    """
    graphs = {level: _cached(source, replace(setting, level=level)) for level in levels}
    # One of the same layers: then each block is what that block becomes.
    alike = {level for level, graph in graphs.items() if graph and graph.layers == plain.layers}
    if missing := [level for level in graphs if level not in alike]:
        from mist.trace.model_trace import trace_levels

        with source.running(setting, progress) as model:
            layers = source.traced.layers if source.traced else None
            traced = trace_levels(model, plain, setting, missing, progress=progress, layers=layers)
        for level, each in traced.items():
            _store(source, replace(setting, level=level), each)
            graphs[level] = each.graph
        alike |= traced.keys()
    return {level: graph for level, graph in graphs.items() if graph and level in alike}


def _cached(source: OpenedSource, setting: TraceSetting) -> "ModelGraph | None":
    from mist.trace.codec import decode_graph

    entry = cache.load(_key(source.source, setting), setting.seq_len)
    return decode_graph(entry.fields) if entry is not None else None


def _store(source: OpenedSource, setting: TraceSetting, traced: "Traced") -> None:
    from mist.trace.codec import encode_graph
    from mist.trace.model_trace import listing

    name = cache.entry_name(_key(source.source, setting), traced.seq_len)
    fields, files = encode_graph(traced.graph), sorted(source.files)
    cache.store(name, traced.graph.facts, fields, listing(traced), files)


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
