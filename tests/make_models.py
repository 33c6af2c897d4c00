"""Writes docs/models.md: `make models`. tests/test_make_models.py compares it."""

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import sympy
import yaml

from mist.model.graph import Block, ModelGraph
from mist.model.summary import Lengths
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, load_graph
from mist.trace.models.presets import PRESETS
from mist.trace.models.source import ConfigSource

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
EXAMPLES = ("my_transformer", "fno", "gnn", "unet")
FAMILIES = Path(__file__).with_name("model_families.yaml")
BF16 = TraceSetting(precision=Precision.BF16, attention=Attention.FLASH)

HEAD = """# Models

Written by `make models` from traces of the presets, of one published size of other families, and
of the examples; do not edit. All in bf16 with flash attention.

- **layers**: each kind with its number, in the order in which they first run.
- **t divides**: the sizes that a tensor-parallel degree must divide; 1: no tensor parallelism.
- **lengths**: the sequence lengths [tokens] that one trace covers; another is traced when asked.
- **seconds**: processor time of a trace without a cache on one core of an x86-64 server.

| model | type | parameters | layers | t divides | lengths | seconds |
|---|---|---|---|---|---|---|
"""
COSTS_HEAD = """
## Expressions

The layer with the most parameters of the models that ship, before sequence parallelism.

| model | forward FLOP | saved bytes |
|---|---|---|
"""


def families() -> dict[str, Mapping[str, object]]:
    """The configurations beside the presets, by name."""
    found: dict[str, Mapping[str, object]] = yaml.safe_load(FAMILIES.read_text())
    return found


def sources() -> dict[str, str | ConfigSource]:
    """Every model of the page, by name."""
    named = {name: ConfigSource(label=name, name=name, config=c) for name, c in families().items()}
    files = {stem.replace("_", "-"): str(ROOT / "examples" / f"{stem}.py") for stem in EXAMPLES}
    return {**{name: name for name in PRESETS}, **named, **files}


def traced(source: str | ConfigSource) -> tuple[ModelGraph, float]:
    """A model's graph and the processor time of its trace [s]."""
    begin = time.process_time()
    graph = load_graph(source, BF16, progress=lambda message: None)
    return graph, time.process_time() - begin


def row(graph: ModelGraph) -> str:
    """A model's row without the seconds."""
    counts: dict[int, int] = {}
    for run in graph.layers:
        counts[run.block] = counts.get(run.block, 0) + run.count
    layers = [f"{graph.blocks[block].name} x{count}" for block, count in counts.items()]
    limits = [f"{limit.size} {limit.label}" for limit in graph.tp_limits or ()]
    config = PRESETS.get(graph.name) or families().get(graph.name) or {}
    kind = str(config.get("model_type", "Python file"))
    cells = (kind, f"{graph.num_params:,}", ", ".join(layers), ", ".join(limits) or "1")
    return " | ".join([graph.name, *cells, words(graph.lengths)])


def words(lengths: Lengths) -> str:
    """Which lengths these are."""
    if lengths.first == lengths.last:
        return f"{lengths.first}"
    name = "all" if lengths.multiple == 1 else f"multiples of {lengths.multiple}"
    start = f" from {lengths.first}" if lengths.first > lengths.multiple else ""
    return name + start + (f" to {lengths.last}" if lengths.last is not None else "")


def costs(graph: ModelGraph) -> str:
    """What the largest layer of a model costs, as expressions."""
    block = max(graph.blocks, key=lambda each: each.num_params)
    flop = sympy.collect(sympy.expand(block.flop("forward")), sympy.Symbol("t"))
    return f"| {graph.name} | {expr(flop)} | {expr(saved(block))} |"


def saved(block: Block) -> sympy.Expr:
    return sympy.expand(sympy.Add(*(tensor.bytes for tensor in block.saved)))


def expr(value: sympy.Expr) -> str:
    return f"`{value}`".replace("**", "^").replace("*", " ")


def page() -> str:
    """The whole of docs/models.md."""
    graphs: list[ModelGraph] = []

    def rows() -> Iterator[str]:
        for name, source in sources().items():
            print(name, file=sys.stderr, flush=True)
            graph, seconds = traced(source)
            graphs.append(graph)
            yield f"| {row(graph)} | {seconds:.0f} |\n"

    table = "".join(rows())
    shipped = [graph for graph in graphs if graph.name not in families()]
    return HEAD + table + COSTS_HEAD + "".join(f"{costs(graph)}\n" for graph in shipped)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # traces that are timed come from no cache
        PAGE.write_text(page())
