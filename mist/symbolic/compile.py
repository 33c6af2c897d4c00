"""Expressions -> vectorised functions: sympy prints them once, the platform's laws are bound.

Columns are arrays of one shape (or broadcastable); results have the broadcast shape, float64.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import sympy
from numpy.typing import ArrayLike, NDArray
from sympy import Expr

from mist.graph import B, ModelGraph, T, Traffic
from mist.platform import Platform
from mist.platform.costs import OpCosts
from mist.spec import Workload
from mist.symbolic import symbols as sym
from mist.symbolic.stage import StageCost, stage_cost

Column = NDArray[np.float64]
Columns = Mapping[str, ArrayLike]

STRATEGY = (B, T, sym.DP, sym.DP_PER_NODE, sym.ZERO)
POSITION = (sym.IN_FLIGHT, sym.FIRST, sym.LAST, sym.PREV_CROSSES, sym.NEXT_CROSSES)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Function:
    """Named outputs of one generated function over named columns."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    call: Callable[..., Sequence[ArrayLike]]

    def __call__(self, columns: Columns) -> dict[str, Column]:
        args = [np.asarray(columns[name], dtype=np.float64) for name in self.inputs]
        shape = np.broadcast_shapes(*(arg.shape for arg in args))
        values = self.call(*args)
        return {
            name: np.broadcast_to(np.asarray(value, dtype=np.float64), shape)
            for name, value in zip(self.outputs, values, strict=True)
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledStageCost:
    """The stage cost as two functions: strategy columns -> terms, terms and layout -> stage.

    `stage` takes the terms and the layout; `search` computes stable_s, lone_s and peak_bytes only,
    `stage` every part as well.
    """

    num_kinds: int
    costs: _Function
    block_terms: _Function
    search: _Function
    stage: _Function

    def terms(self, strategy: Columns) -> dict[str, Column]:
        """`term_*` columns of strategies given as b, t, dp, dp_per_node, zero."""
        return self.block_terms({**strategy, **self.costs(strategy)})


def compile_stage_cost(
    graph: ModelGraph, platform: Platform, workload: Workload
) -> CompiledStageCost:
    """Bind the stage expressions of a model to a platform."""
    cost = stage_cost(graph, platform.runtime, workload.precision, workload.seq_len)
    costs = OpCosts(
        device=platform.device,
        cluster=platform.cluster,
        runtime=platform.runtime,
        precision=workload.precision,
    )
    blocks = {f"cost_{name}": expr for name, expr in cost.costs.items()}
    terms = {f"term_{name}": expr for name, expr in cost.terms.items()}
    wanted = ("stable_s", "lone_s", "peak_bytes")
    search = {name: cost.stage[name] for name in wanted}
    return CompiledStageCost(
        num_kinds=cost.num_kinds,
        costs=_compile(STRATEGY, blocks, _bindings(costs)),
        block_terms=_compile(_inputs(STRATEGY, terms), terms, _bindings(costs)),
        search=_compile(_stage_inputs(cost), search, {}),
        stage=_compile(_stage_inputs(cost), cost.stage, {}),
    )


def _stage_inputs(cost: StageCost) -> tuple[sympy.Symbol, ...]:
    """Position, counts by kind and level, and the terms that the formulas name."""
    counts = [f(kind) for kind in range(cost.num_kinds) for f in (sym.eager_count, sym.full_count)]
    return _inputs((*POSITION, *counts), cost.stage)


def _inputs(
    first: tuple[sympy.Symbol, ...], outputs: Mapping[str, Expr]
) -> tuple[sympy.Symbol, ...]:
    """The given symbols, then all others that the outputs name."""
    named = {symbol for expr in outputs.values() for symbol in expr.free_symbols}
    return (*first, *sorted(named - set(first), key=str))


def _compile(
    inputs: Sequence[sympy.Symbol], outputs: Mapping[str, Expr], functions: Mapping[str, object]
) -> _Function:
    call = sympy.lambdify(
        list(inputs), list(outputs.values()), modules=[dict(functions), "numpy"], cse=True
    )
    return _Function(inputs=tuple(map(str, inputs)), outputs=tuple(outputs), call=call)


def _bindings(costs: OpCosts) -> dict[str, Callable[..., ArrayLike]]:
    """The platform's laws under the names that the expressions use."""
    laws: dict[str, Callable[..., ArrayLike]] = {
        "gemm_s": costs.gemm_s,
        "attention_forward_s": costs.attention_forward_s,
        "attention_backward_s": costs.attention_backward_s,
        "all_gather_s": costs.all_gather_s,
        "reduce_scatter_s": costs.reduce_scatter_s,
        "all_reduce_s": costs.all_reduce_s,
        "p2p_s": costs.p2p_s,
    }
    memory = {f"memory_{name}_s": partial(costs.memory_s, traffic=name) for name in Traffic}
    return laws | memory
