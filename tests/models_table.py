"""Prints the table of models in docs/cost-model.md: `python -m tests.models_table`."""

from pathlib import Path

import sympy

from mist.model.graph import Block
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, load_graph
from mist.trace.models.presets import PRESETS

EXAMPLES = ("my_transformer", "fno", "gnn", "unet")
BF16 = TraceSetting(precision=Precision.BF16, attention=Attention.FLASH)


def row(source: str) -> str:
    """One model: its largest block by parameters among the layers."""
    graph = load_graph(source, BF16, progress=lambda message: None)
    block = max(graph.blocks, key=lambda each: each.num_params)
    limits = ", ".join(f"{limit.size} {limit.label}" for limit in graph.tp_limits or ())
    cells = (
        graph.name,
        f"{graph.num_params:,}",
        f"{graph.num_layers} ({len(graph.blocks)})",
        expr(sympy.collect(sympy.expand(block.flop("forward")), sympy.Symbol("t"))),
        expr(saved(block)),
        limits or "1",
    )
    return "| " + " | ".join(cells) + " |"


def saved(block: Block) -> sympy.Expr:
    return sympy.expand(sympy.Add(*(tensor.bytes for tensor in block.saved)))


def expr(value: sympy.Expr) -> str:
    return f"`{value}`".replace("**", "^").replace("*", " ")


def table() -> str:
    examples = Path(__file__).parents[1] / "examples"
    head = "| model | parameters | layers (kinds) | forward FLOP | saved bytes | t divides |"
    rows = [row(name) for name in PRESETS]
    rows += [row(str(examples / f"{stem}.py")) for stem in EXAMPLES]
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


if __name__ == "__main__":
    print(table())
