"""From a model's source to its compiled costs under a runtime: from the cache, else traced."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from mist.model.summary import ModelLimits
from mist.platform import Runtime
from mist.symbolic.program import ModelPrograms
from mist.symbolic.program_cache import load_programs, programs_key, store_programs
from mist.trace import ConfigSource, TraceSetting, load_graph, trace_digest
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
    refuse: Callable[[ModelLimits], None] = lambda limits: None,
) -> ModelPrograms:
    """The costs of a model under a runtime, for any number of GPUs, sequence and batch.

    From the cache, where they need neither torch nor sympy; else from the trace. `profile_hash`:
    of the runtime's file. `refuse`: see `load_graph`. Raises InputError.
    """
    key = _key(source, setting, profile_hash)
    programs = load_programs(cache_folder(), key) if key else None
    if programs is not None:
        progress(f"{programs.facts.name}: trace from the cache")
        return programs
    graph = load_graph(source, setting, progress=progress, refuse=refuse)
    programs = compile_graph(graph, setting, runtime)
    # Asked again, because a model that was not in the cache has a trace there only now.
    if key := _key(source, setting, profile_hash):
        store_programs(cache_folder(), key, programs)
    return programs


def compile_graph(graph: "ModelGraph", setting: TraceSetting, runtime: Runtime) -> ModelPrograms:
    """The costs of a traced model under a runtime."""
    from mist.symbolic.compile import compile_model  # sympy, which cached programs do not need

    return compile_model(graph, runtime, setting.precision)


def _key(source: str | ConfigSource, setting: TraceSetting, profile_hash: str) -> str | None:
    """Where the programs of a cached trace are kept; None without a cached trace."""
    trace = trace_digest(source, setting)
    return programs_key(trace, profile_hash, setting.precision) if trace else None
