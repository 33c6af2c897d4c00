"""Which kernels a compiled graph needs: pointwise operations and reductions that run as one.

Inductor fuses operations that are not heavy (no product, no attention) where none such lies between
them. A value that only its own kernel uses stays in registers; a kernel reads what comes from
outside once, and writes what heavy operations or other kernels take, or what is given out. Real
fusion also looks at the shapes of loops, so this is the least traffic that the graph allows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Final

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from mist.model.summary import Traffic
from mist.trace.expressions import Size, num_bytes
from mist.trace.operations.kernels import OPAQUE

aten, prims = torch.ops.aten, torch.ops.prims
REDUCTIONS: Final = frozenset(
    {aten.sum, aten.mean, aten.amax, aten.amin, aten.any, aten.var, aten.var_mean}
)
FUSIBLE: Final = REDUCTIONS | {
    aten.cat, aten.full, aten.full_like, aten.rand_like, aten.rand, aten._to_copy, aten.copy,
    aten.constant_pad_nd, OPAQUE[aten.constant_pad_nd].overloadpacket, aten.arange, aten.index,
    aten.slice_scatter, aten.select_scatter, prims.convert_element_type, prims.iota,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What a call of a compiled graph does to memory.

    `hidden`: its result stays in registers. `charged`: the traffic of a whole kernel is counted
    here, where the last of its results is written.
    """

    hidden: bool
    charged: bool = False
    read_bytes: Size = 0
    written_bytes: Size = 0
    traffic: Traffic = Traffic.POINTWISE


def kernels_of(graph: fx.Graph) -> Mapping[fx.Node, Kernel]:
    """The kernels of the operations that fuse; a call that is not in it runs by itself.

    Every node has its (fake) result in `meta["val"]`.
    """
    levels = _levels(graph)
    needed = frozenset(node for node in levels if _is_needed(node, levels))
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in (n for n in levels if _fuses(n) and not _is_view(n)):
        # A node joins the kernels that it reads from, unless a heavy operation lies between.
        neighbours = (groups[b] for b in _bases(node) if b in groups and levels[b] == levels[node])
        distinct = {id(group): group for group in neighbours}
        merged = [*(each for group in distinct.values() for each in group), node]
        groups |= dict.fromkeys(merged, merged)
    kernels = {node: Kernel(hidden=node not in needed) for node in groups}
    for group in {id(group): group for group in groups.values()}.values():
        if writes := [node for node in group if node in needed]:
            kernels[writes[-1]] = _kernel(group, writes)
    return kernels


def _kernel(nodes: Sequence[fx.Node], writes: Sequence[fx.Node]) -> Kernel:
    """One kernel of these operations, some of whose results are written."""
    reads = {base: None for node in nodes for base in _bases(node)}
    reduces = any(_packet(node) in REDUCTIONS for node in nodes)
    return Kernel(
        hidden=False,
        charged=True,
        read_bytes=_bytes([base for base in reads if base not in nodes]),
        written_bytes=_bytes(writes),
        traffic=Traffic.REDUCTION if reduces else Traffic.POINTWISE,
    )


def _levels(graph: fx.Graph) -> dict[fx.Node, int]:
    """Between which heavy operations each node runs: how many of them lie behind it.

    What fuses runs with the first that uses it; sizes come before everything.
    """
    levels: dict[fx.Node, int] = {}
    for node in graph.nodes:
        behind = (levels[each] + _is_heavy(each) for each in node.all_input_nodes)
        levels[node] = max(behind, default=0) if any(True for _ in _results(node)) else 0
    for node in reversed(graph.nodes):
        if _fuses(node):
            uses = (levels[user] for user in node.users if user.op != "output")
            levels[node] = min(uses, default=levels[node])
    return levels


def _is_needed(node: fx.Node, levels: Mapping[fx.Node, int]) -> bool:
    """Whether anything outside its own kernel takes a result."""
    users = list(_users(node))
    return any(not _fuses(user) or levels[user] != levels[node] for user in users)


def _users(node: fx.Node) -> Iterator[fx.Node]:
    """What takes a result, itself or a view of it."""
    for user in node.users:
        if _is_view(user):
            yield from _users(user)
        else:
            yield user


def _bases(node: fx.Node) -> Iterator[fx.Node]:
    """What a node reads: results that are no views; of several results of one call those taken."""
    return (_base(each) for each in node.all_input_nodes)


def _base(node: fx.Node) -> fx.Node:
    if not _is_view(node):
        return node
    base = node.all_input_nodes[0]
    return node if node.target is getitem and _is_heavy(base) else _base(base)


def _packet(node: fx.Node) -> object:
    return node.target.overloadpacket if isinstance(node.target, OpOverload) else node.target


def _is_view(node: fx.Node) -> bool:
    views = isinstance(node.target, OpOverload) and node.target.is_view
    return views or _packet(node) in (getitem, aten._unsafe_view, aten.alias)


def _fuses(node: fx.Node) -> bool:
    pointwise = isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags
    return pointwise or _is_view(node) or _packet(node) in FUSIBLE


def _is_heavy(node: fx.Node) -> bool:
    """A call that runs by itself; a size is none."""
    is_call = node.op == "call_function" and not _fuses(node)
    return is_call and any(True for _ in _results(node))


def _results(node: fx.Node) -> Iterator[torch.Tensor]:
    leaves = tree_leaves(node.meta.get("val"))
    return (leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


def _bytes(nodes: Sequence[fx.Node]) -> Size:
    return sum((num_bytes(each) for node in nodes for each in _results(node)), start=0)
