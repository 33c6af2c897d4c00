"""From a model's source to its compiled costs under a runtime: from the cache, else traced."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mist.errors import InputError, TraceError
from mist.model.summary import ModelLimits
from mist.plans.memory_levels import CONVERTS, PLAIN
from mist.plans.numerics import NUMERICS
from mist.plans.workload import HeadMode, MemoryLevel, Optimizer
from mist.platform import Runtime
from mist.rules.apply import as_applied
from mist.symbolic.program import ModelPrograms
from mist.symbolic.program_cache import load_programs, programs_key, store_programs
from mist.symbolic.program_trial import computes
from mist.trace import (
    ConfigSource,
    OpenedSource,
    TraceSetting,
    forget_trace,
    load_graph,
    load_levels,
    opened,
    trace_digest,
)
from mist.trace.trace_cache import cache_folder

if TYPE_CHECKING:
    from mist.model.graph import ModelGraph

Progress = Callable[[str], None]


def quiet(message: str) -> None:
    """Progress that nobody listens to."""


def model_programs(  # noqa: PLR0913 - a model, how it is traced and run, and who hears of it
    source: str | ConfigSource,
    setting: TraceSetting,
    runtime: Runtime,
    profile_hash: str,
    progress: Progress,
    *,
    optimizer: Optimizer,
    refuse: Callable[[ModelLimits], None] = lambda limits: None,
    levels: Collection[MemoryLevel] = (),
    heads: Iterable[HeadMode] = (),
) -> ModelPrograms:
    """The costs of a model under a runtime, for any number of GPUs, sequence and batch.

    From the cache, where they need neither torch nor sympy; else from the trace. `profile_hash`:
    of the runtime's file. `refuse`: see `load_graph`. `levels`: those to price beside the usual
    ones; `heads`: how the head may run, beside the model's own way.
    What the model cannot have is left out, and `progress` hears why. Raises InputError.
    """
    known = [level for level in runtime.levels if level in levels]
    settings = [replace(setting, level=level) for level in known if level in CONVERTS]
    if runtime.converts_layers:
        settings += [replace(setting, head=mode) for mode in heads]
    profile_hash = " ".join([profile_hash, *sorted({*known}.intersection(PLAIN))])
    key = _key(source, setting, profile_hash, settings, optimizer)
    programs = load_programs(cache_folder(), key) if key else None
    if programs is not None:
        progress(f"{programs.facts.name}: trace from the cache")
        return programs

    def traced() -> ModelPrograms:
        model = opened(source)
        graph = load_graph(model, setting, progress=progress, refuse=refuse)
        again = [
            *_again(model, setting, settings, graph, progress),
            *as_it_is(graph, setting, known),
        ]
        return compile_graph(graph, setting, runtime, optimizer, again)

    programs = traced()
    if not computes(programs):
        # Of a false trace in the cache: sizes of the right form that no model has.
        for each in (setting, *settings):
            forget_trace(source, each)
        programs = traced()
    # Asked again, because a model that was not in the cache has a trace there only now.
    if key := _key(source, setting, profile_hash, settings, optimizer):
        store_programs(cache_folder(), key, programs)
    return programs


def _again(
    source: OpenedSource,
    setting: TraceSetting,
    again: Iterable[TraceSetting],
    graph: "ModelGraph",
    progress: Progress,
) -> "Iterator[tuple[TraceSetting, ModelGraph]]":
    """A model at levels that convert its layers, or with other heads, where it can have them."""
    again = list(again)
    levels = [each.level for each in again if each.head is setting.head]
    for level, traced in load_levels(source, setting, levels, graph, progress=progress).items():
        yield replace(setting, level=level), traced
    for each in again:
        if each.head is not setting.head:
            try:
                yield each, load_graph(source, each, progress=progress)
            except (InputError, TraceError) as error:
                progress(f"{graph.name} has no head {each.head}: {error}")


def compile_graph(
    graph: "ModelGraph",
    setting: TraceSetting,
    runtime: Runtime,
    optimizer: Optimizer,
    again: "Sequence[tuple[TraceSetting, ModelGraph]]" = (),
) -> ModelPrograms:
    """The costs of a traced model under a runtime.

    `again`: the same at further levels, or with further heads.
    """
    # sympy, which cached programs do not need
    from mist.symbolic.compile import compile_model
    from mist.symbolic.cost_setting import CostSetting

    numerics = NUMERICS[setting.precision]
    cost_setting = CostSetting(
        runtime=as_applied(runtime, graph), numerics=numerics, optimizer=optimizer
    )
    converted = {each.level: it.blocks for each, it in again if each.level in CONVERTS}
    heads = {each.head: it.head for each, it in again if each.head is not setting.head}
    more = [each.level for each, _ in again if each.level in PLAIN]
    return compile_model(graph, cost_setting, converted, heads, more)


def as_it_is(
    graph: "ModelGraph", setting: TraceSetting, levels: Iterable[MemoryLevel]
) -> "list[tuple[TraceSetting, ModelGraph]]":
    """A model at those of the levels that convert none of its layers."""
    return [(replace(setting, level=level), graph) for level in levels if level in PLAIN]


def _key(
    source: str | ConfigSource,
    setting: TraceSetting,
    profile_hash: str,
    converted: Iterable[TraceSetting],
    optimizer: Optimizer,
) -> str | None:
    """Where the programs of cached traces are kept; None where one of them is not cached."""
    traces = [trace_digest(source, each) for each in (setting, *converted)]
    known = [trace for trace in traces if trace is not None]
    if len(known) < len(traces):
        return None
    return programs_key(" ".join(known), profile_hash, setting.precision, optimizer)
