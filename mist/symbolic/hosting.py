"""Terms of host memory, by block: offloaded states as they are allocated, and modules as drawn.

See `mist.host_memory`.
"""

import sympy
from sympy import Expr

from mist.graph import Block, ModelGraph
from mist.platform.runtime import Runtime
from mist.symbolic import symbols as sym
from mist.symbolic.slots import hosted_by_tensor


def allocated_terms(graph: ModelGraph, runtime: Runtime) -> dict[str, Expr]:
    """Bytes of the offloaded states of each block in host memory, tensor by tensor.

    Of the ends only the optimizer's states go there. A tied parameter has them once.
    """
    layers = {str(kind): block.params for kind, block in enumerate(graph.blocks)}
    blocks = layers | {"embed": graph.embed.params, "head": graph.head.params}
    blocks |= {"tied": tuple(param for param in graph.head.params if param.tied)}
    terms = {}
    for x, params in blocks.items():
        states = ("weights", "grads", "optimizer") if x in layers else ("optimizer",)
        held = (sym.OFFLOAD[name] * hosted_by_tensor(runtime, name, params) for name in states)
        terms[f"{x}_allocated_bytes"] = sympy.Add(*held)
    return terms


def drawn_terms(graph: ModelGraph, runtime: Runtime) -> dict[str, Expr]:
    """Bytes of the largest module of each block, whole, as every rank of a stage draws it."""
    ends = {"embed": graph.embed, "head": graph.head}
    blocks = ends | {str(kind): block for kind, block in enumerate(graph.blocks)}
    each = runtime.loading.module_bytes_per_param.value if runtime.loading else 0.0
    return {f"{x}_drawn_bytes": each * _largest_module(block) for x, block in blocks.items()}


def _largest_module(block: Block) -> Expr:
    """The most numbers that one module of a block has in parameters of its own."""
    of_modules: dict[str, int] = {}
    for param in block.params:
        owner = param.name.rpartition(".")[0]
        of_modules[owner] = of_modules.get(owner, 0) + param.num_reals
    return sympy.Integer(max(of_modules.values(), default=0))
