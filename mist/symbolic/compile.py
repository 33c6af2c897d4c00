"""Expressions -> programs: sympy finds common subexpressions and prints numpy, once per model."""

from collections.abc import Collection, Mapping, Sequence

import sympy
from sympy import Basic, Expr
from sympy.printing.numpy import NumPyPrinter

from mist.model.graph import B, Block, ModelGraph, OpKind, S, T
from mist.plans.workload import HeadMode, MemoryLevel
from mist.symbolic import symbols as sym
from mist.symbolic.cost_setting import CostSetting
from mist.symbolic.program import SEARCHED, ModelPrograms, Program
from mist.symbolic.stage import (
    NO_HEADS,
    NOT_CONVERTED,
    ConvertedBlocks,
    Heads,
    StageCost,
    stage_cost,
)

SIZES = (B, S, T)
RANKS = (
    B,
    S,
    T,
    sym.SHARD,
    sym.SHARD_PER_NODE,
    sym.COPIES,
    sym.COPIES_PER_NODE,
    sym.ZERO,
    sym.HEAD,
    sym.TP_PER_NODE,
    sym.PIPELINED,
)
STRATEGY = (*RANKS, *sym.OFFLOAD.values())
POSITION = (
    sym.IN_FLIGHT,
    sym.LAYERS_MORE,
    sym.EMBED_MORE,
    sym.HEAD_HELD,
    sym.SPLITS,
    sym.WAITING,
    sym.ONE_ROUND,
    sym.CHUNKS,
    sym.NUM_MICRO_BATCHES,
    sym.FORWARD_FIRST,
    sym.FIRST,
    sym.LAST,
    sym.PREV_CROSSES,
    sym.NEXT_CROSSES,
    sym.SPANS_NODES,
)


def compile_model(
    graph: ModelGraph,
    setting: CostSetting,
    converted: ConvertedBlocks = NOT_CONVERTED,
    heads: Heads = NO_HEADS,
    more: Collection[MemoryLevel] = (),
) -> ModelPrograms:
    """Build the stage cost of a traced model under a setting, and print it.

    `converted`: its blocks at memory levels that convert them; `heads`: its head in other modes.
    `more`: levels to price beside the usual ones, which convert nothing.
    """
    cost = stage_cost(graph, setting, converted, heads, more)
    costs = {f"cost_{name}": expr for name, expr in cost.costs.items()}
    terms = {f"term_{name}": expr for name, expr in cost.terms.items()}
    search = {name: cost.stage[name] for name in SEARCHED}
    counts = _stage_inputs(cost)
    return ModelPrograms(
        facts=graph.facts,
        costs=print_program(RANKS, costs),
        terms=print_program(_inputs(STRATEGY, terms), terms),
        search_terms=_only(terms, search),
        search=print_program(_inputs(counts, search), search),
        stage=print_program(_inputs(counts, cost.stage), cost.stage),
        flop=print_program(SIZES, _model_flop(graph)),
        domain=print_program((*SIZES, sym.HEAD), _domain(graph, heads)),
        heads=tuple(mode for mode in HeadMode if mode is HeadMode.NONE or mode in heads),
    )


def _only(terms: Mapping[str, Expr], search: Mapping[str, Expr]) -> Program:
    """The terms that the search needs."""
    needed = {str(symbol) for expr in search.values() for symbol in expr.free_symbols}
    wanted = {name: expr for name, expr in terms.items() if name in needed}
    return print_program(_inputs(STRATEGY, wanted), wanted)


def _model_flop(graph: ModelGraph) -> dict[str, Basic]:
    """FLOPs that training needs of each block: backward as two forward passes, by convention.

    Where something is frozen, backward is the products that run, and attention as two forward.
    """
    blocks = {"embed": graph.embed, "head": graph.head}
    blocks |= {str(kind): block for kind, block in enumerate(graph.blocks)}
    if graph.num_trainable == graph.num_params:
        return {name: 3 * block.flop("forward") for name, block in blocks.items()}
    return {name: block.flop("forward") + _backward_flop(block) for name, block in blocks.items()}


def _backward_flop(block: Block) -> Expr:
    """The products of the backward pass; attention, where it has one, as two forward passes."""
    scores = [op for op in block.ops if op.kind is OpKind.ATTENTION]
    once = sympy.Add(*(op.flop for op in scores if op.phase == "forward"))
    run = sympy.Add(*(op.flop for op in scores if op.phase == "backward"))
    return block.flop("backward") - run + (2 * once if run != 0 else 0)


def _domain(graph: ModelGraph, heads: Heads) -> dict[str, Basic]:
    """Each relation once, in an order that does not change from run to run; then those of heads.

    A head's are one number, 0 where one of them does not hold.
    """
    blocks: tuple[Block, ...] = (graph.embed, *graph.blocks, graph.head)
    always = {relation for block in blocks for relation in block.domain}
    domain = {str(relation): relation for relation in sorted(always, key=str)}
    for mode, head in heads.items():
        if more := sorted(set(head.domain) - always, key=str):
            # A product: numpy's And needs columns of one shape.
            holds = sympy.Mul(*(sympy.Piecewise((1, each), (0, True)) for each in more))
            rows = ((1, sympy.Ne(sym.HEAD, tuple(HeadMode).index(mode))), (holds, True))
            words = " and ".join(map(str, more))
            domain[f"{words} with head {mode}"] = sympy.Piecewise(*rows)
    return domain


def _stage_inputs(cost: StageCost) -> tuple[sympy.Symbol, ...]:
    """Position, then layers by kind and level."""
    kinds = range(cost.num_kinds)
    counts = (sym.layer_count(level.column, kind) for kind in kinds for level in cost.levels)
    return (*POSITION, *counts)


def _inputs(
    first: Sequence[sympy.Symbol], outputs: Mapping[str, Basic]
) -> tuple[sympy.Symbol, ...]:
    """The given symbols, then all others that the outputs name."""
    named = {symbol for expr in outputs.values() for symbol in expr.free_symbols}
    # A set has no fixed order: sorted by name, a model prints the same program every time.
    return (*first, *sorted(named - set(first), key=str))


def print_program(inputs: Sequence[sympy.Symbol], outputs: Mapping[str, Basic]) -> Program:
    """A numpy function of the inputs that returns the outputs, as text."""
    printer = NumPyPrinter({"fully_qualified_modules": False, "allow_unknown_functions": True})
    shared, results = sympy.cse(list(outputs.values()), list=True)
    lines = [f"{symbol} = {printer.doprint(expr)}" for symbol, expr in shared]
    values = ", ".join(printer.doprint(expr) for expr in results)
    names = tuple(map(str, inputs))
    body = [
        f"def program({', '.join(names)}):",
        *lines,
        f"return ({values}{',' if values else ''})",
    ]
    return Program(inputs=names, outputs=tuple(outputs), source="\n    ".join(body) + "\n")
